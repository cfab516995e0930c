"""What the agent makes in the staged devtmpfs and sysfs for devices that come and go.

A step is a list: ``directory PATH``, ``file PATH CONTENT MODE``, ``link PATH TARGET``, ``node PATH SOURCE`` (a staged
file that is mounted on it) or ``gone PATH``. Directories on the way are made. A file or link that is there already is
replaced.

The rehearsed tree can write to both, while the agent sees all of the host: no step may follow what the tree made. Every
directory on the way is opened from the one before, and no symbolic link is followed.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from ipe_emu.errors import NotJudgedError
from ipe_emu.linux import mounts, openat2

_WITHIN: Final = openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS | openat2.RESOLVE_NO_XDEV
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: What makes us the owner of the files while it lasts.
AsOwner = Callable[[], AbstractContextManager[None]]


def furnish(root: Path, steps: Sequence[Sequence[Any]], as_owner: AsOwner) -> None:
    """Carry out steps below ``root``, whose files belong to whom ``as_owner`` makes of us.

    OSError from what fails, NotJudgedError where something is in the way that the kernel would not have let a tree make
    in sysfs, or would have left in devtmpfs.
    """
    top = os.open(root, _DIRECTORY)
    try:
        for kind, path, *rest in steps:
            try:
                _step(top, kind, path, rest, as_owner)
            except _InTheWayError as error:
                raise NotJudgedError(
                    f"{error}, made by the rehearsed tree, is where /{root.name}/{path} of a device belongs"
                ) from None
    finally:
        os.close(top)


def copy_of_node(source: Path) -> int:
    """Return a detached copy of a staged device node. NotJudgedError if it is no device (any more).

    Some are in the staged devtmpfs, where the tree can put something else: a link of its own would lead anywhere on
    the host.
    """
    tree = mounts.clone(source, recursive=False, follow=False)
    mode = os.fstat(tree).st_mode
    if not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode):
        os.close(tree)
        raise NotJudgedError(f"the rehearsed tree put something else in the place of the device {source.name}")
    return tree


class _InTheWayError(Exception):
    """Something else is where a step needs a directory, or a new name."""


def _step(top: int, kind: str, path: str, rest: list[Any], as_owner: AsOwner) -> None:
    *above, name = path.split("/")
    if not name or {".", ".."} & {name, *above}:
        raise ValueError(f"no place for a device: {path!r}")
    if kind == "gone":
        with contextlib.suppress(FileNotFoundError), _directory(top, above, None) as directory:
            _remove(directory, name, as_owner)
        return
    with _directory(top, above, as_owner) as directory:
        match kind, rest:
            case "directory", []:
                with as_owner():
                    os.close(_open_or_make(directory, name))
            case "file", [content, mode]:
                with as_owner():
                    _unlink(directory, name)
                    _write(directory, name, os.fsencode(content), mode)
            case "link", [target]:
                with as_owner():
                    _unlink(directory, name)
                    os.symlink(target, name, dir_fd=directory)
            case "node", [source]:
                with as_owner():
                    _write(directory, name, b"", 0o644)
                _mount(Path(source), directory, name)
            case _:
                raise ValueError(f"no step {kind!r}")


@contextmanager
def _directory(top: int, names: Sequence[str], as_owner: AsOwner | None) -> Iterator[int]:
    """Open a directory below ``top``; it and those on the way are made if ``as_owner`` says as whom."""
    current = os.dup(top)
    try:
        for name in names:
            if as_owner is None:
                below = _open(current, name)
            else:
                with as_owner():
                    below = _open_or_make(current, name)
            os.close(current)
            current = below
        yield current
    finally:
        os.close(current)


def _open_or_make(directory: int, name: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=directory)
    return _open(directory, name)


def _open(directory: int, name: str) -> int:
    """Open a directory in another one; FileNotFoundError if it is not there."""
    try:
        fd = openat2.open_path(directory, os.fsencode(name), _WITHIN)
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.EXDEV}:
            raise
        what = "a symbolic link" if error.errno == errno.ELOOP else "a mount"
        raise _InTheWayError(f"{what} {name!r}") from None
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise _InTheWayError(f"a file {name!r}")
    return fd


def _unlink(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise _InTheWayError(f"a directory {name!r}") from None


def _write(directory: int, name: str, content: bytes, mode: int) -> None:
    try:
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
    except FileExistsError:
        raise _InTheWayError(f"something named {name!r}") from None
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        os.fchmod(fd, mode)


def _mount(source: Path, directory: int, name: str) -> None:
    """Mount a copy of a staged file on a file, which must be one: the tree may have put something else there."""
    tree = copy_of_node(source)
    try:
        target = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not stat.S_ISREG(os.fstat(target).st_mode):
                raise _InTheWayError(f"something named {name!r}")
            mounts.attach_at(tree, target)
        finally:
            os.close(target)
    finally:
        os.close(tree)


def _remove(directory: int, name: str, as_owner: AsOwner) -> None:
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        os.fchdir(directory)
        try:
            mounts.detach(os.fsencode(name))
        finally:
            os.chdir("/")  # a working directory elsewhere would keep a mount busy
    with as_owner():
        if stat.S_ISDIR(mode):
            shutil.rmtree(name, dir_fd=directory)  # by descriptors all the way down (rmtree.avoids_symlink_attacks)
        else:
            _unlink(directory, name)
