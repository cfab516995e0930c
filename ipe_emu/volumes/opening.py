"""Opening images."""

import os
import stat
from pathlib import Path

from ipe_emu.errors import UserError


def open_image(path: Path | str, *, writable: bool = False) -> int:
    """Return a descriptor of an image: a regular file or a block device. UserError for anything else."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    found = os.fstat(fd).st_mode
    if not stat.S_ISREG(found) and not stat.S_ISBLK(found):
        os.close(fd)
        raise UserError(f"{path}: is neither a regular file nor a block device")
    return fd
