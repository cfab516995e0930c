"""Reading what users name, bounded, and creating files without following or overwriting what is there."""

import errno
import os
import stat
from pathlib import Path

from ipe_emu.cli.output import escape
from ipe_emu.errors import UserError

#: The option value that stands for stdin.
STDIN = "-"


def name_of(path: str) -> str:
    """The name of an input file as messages give it."""
    return "<stdin>" if path == STDIN else escape(path)


def read_bounded(path: str, limit: int, what: str) -> bytes:
    """Read a file, a pipe or stdin (``-``) of at most ``limit`` bytes.

    Raises UserError, which names ``what`` should be there, if the file is longer, is a directory, or cannot be read.
    """
    try:
        with open(0 if path == STDIN else path, "rb", closefd=path != STDIN) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{name_of(path)}: {error.strerror} (expected here: {what})") from None
    if len(data) > limit:
        raise UserError(f"{name_of(path)}: longer than {limit} bytes, the most that {what} may have")
    return data


def refuse_to_overwrite(path: str, *, force: bool) -> None:
    """Raise UserError if ``path`` exists and ``force`` is not given, or if it is anything but a regular file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not force:
        raise UserError(f"{escape(path)}: exists; --force overwrites it")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{escape(path)}: is no regular file, and only a regular file is overwritten")


def check_writable(path: str) -> None:
    """Raise OSError if `write_report` could not write ``path``. A file that is not there is not made."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        directory = Path(path).parent
        os.close(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    else:
        if not stat.S_ISFIFO(found.st_mode):  # which would wait for a reader
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))


def write_report(path: str, text: str) -> None:
    """Write a file that is its owner's alone, if it is new; OSError as open(2) and write(2)."""
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as f:
        f.write(text)


def create(path: str, data: bytes, *, mode: int, force: bool) -> None:
    """Write a new file with ``mode``; with ``force``, in the place of an old one, whose links keep the old content.

    Raises UserError if the file exists and ``force`` is not given; OSError as open(2) and write(2) do.
    """
    refuse_to_overwrite(path, force=force)
    if force:
        Path(path).unlink(missing_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise UserError(f"{escape(path)}: exists; --force overwrites it") from None
    with os.fdopen(fd, "wb") as file:
        file.write(data)
