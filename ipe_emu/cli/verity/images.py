"""Opening images and files, and naming them in messages."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from ipe_emu.cli.output import escape
from ipe_emu.errors import KernelError, UserError

#: How many processes may work at once: one for each core, and no more than memory is there for.
JOBS = min(8, len(os.sched_getaffinity(0)))


@contextmanager
def opened(path: str, *, writable: bool = False) -> Iterator[int]:
    """Open an image: a regular file or a block device. UserError for anything else, OSError as open(2)."""
    mode = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(fd).st_mode
        if not stat.S_ISREG(found) and not stat.S_ISBLK(found):
            raise UserError(f"{escape(path)}: is neither a regular file nor a block device")
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
