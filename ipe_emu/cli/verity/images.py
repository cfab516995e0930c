"""Opening images and files, and naming them in messages."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ipe_emu.cli.output import escape
from ipe_emu.errors import KernelError, UserError
from ipe_emu.volumes.opening import open_image

#: How many processes may work at once: one for each core, and no more than memory is there for.
JOBS = min(8, len(os.sched_getaffinity(0)))


@contextmanager
def opened(path: str, *, writable: bool = False) -> Iterator[int]:
    """Open an image: a regular file or a block device. UserError for anything else."""
    fd = open_image(path, writable=writable)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the name of the file before what is said of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{escape(path)}: {error}") from None
    except KernelError as error:
        raise KernelError(error.errno or 0, f"{escape(path)}: {error.reason}", error.function) from None
