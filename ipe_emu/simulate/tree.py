"""A tree of files as a process sees it whose root directory it is, looked at from outside.

The tree may be hostile. Nothing in it leads out of it: every lookup is an openat2(2) with RESOLVE_IN_ROOT. Only regular
files are ever opened. What is mounted below it is another file system, and not walked.
"""

import errno
import os
import stat
from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from typing import Final, Self

from attrs import evolve, frozen

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.linux import mountinfo, openat2

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TO_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_IN_ROOT: Final = openat2.RESOLVE_IN_ROOT | openat2.RESOLVE_NO_MAGICLINKS
_BELOW: Final = openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS
#: So many names of a directory are sorted at once: all of them, but for one that means to exhaust memory.
_SORTED_AT_ONCE: Final = 100_000
#: So many inodes with several names are remembered; of the rest, every name counts.
_REMEMBERED: Final = 500_000
_DELETED: Final = b" (deleted)"
# What a lookup answers about the tree; any other errno says that we could not look.
_LOOKUP_ERRORS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


@frozen
class Found:
    """A regular file of the tree: ``fd`` open for reading, and its path from the tree's root, with a slash before."""

    path: bytes
    fd: int
    st: os.stat_result


@frozen
class Unreadable:
    """A file or directory that could not be opened, and why."""

    path: bytes
    reason: str
    st: os.stat_result | None = None


class Tree:
    """A directory, and all that is below it on the same mount."""

    def __init__(self, directory: bytes) -> None:
        """Open it. OSError as open(2)."""
        self.fd = os.open(directory, _DIRECTORY)
        try:
            self.path = os.readlink(f"/proc/self/fd/{self.fd}".encode())  # noqa: PTH115 - bytes
            self.location = mountinfo.locate(self.path)
            self._device = os.fstat(self.fd).st_dev
        except BaseException:
            os.close(self.fd)
            raise
        self._prefix = self.path.rstrip(b"/")
        mounts = {mount.point for mount in mountinfo.of("self").values()}
        #: What is mounted in the tree, by paths from its root: not walked.
        self.mounts = sorted(
            point[len(self._prefix) :] for point in mounts if point.startswith(self._prefix + b"/") and point != b"/"
        )
        self._foreign = frozenset(self.mounts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.fd)

    # -- every file ---------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Found | Unreadable]:
        """Yield every regular file once, those of a directory before what is deeper.

        A descriptor is closed when the next file is asked for. An inode with several names comes by the first of them.
        Files that vanish meanwhile were not there.
        """
        seen: set[int] = set()
        pending = [b""]
        while pending:
            directory = pending.pop()
            below: list[bytes] = []
            try:
                fd = self._open_directory(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                yield Unreadable(directory or b"/", error.strerror or str(error))
                continue
            try:
                yield from self._files(fd, directory, below, seen)
            except OSError as error:
                yield Unreadable(directory or b"/", error.strerror or str(error))
            finally:
                os.close(fd)
            pending += reversed(below)

    def _open_directory(self, path: bytes) -> int:
        if not path:
            return os.open(b".", _DIRECTORY, dir_fd=self.fd)
        found = openat2.open_path(self.fd, path[1:], _BELOW)
        try:
            if os.fstat(found).st_dev != self._device:
                raise OSError(errno.EXDEV, "another file system, or a subvolume")
            return os.open(b".", _DIRECTORY, dir_fd=found)
        finally:
            os.close(found)

    def _files(self, fd: int, directory: bytes, below: list[bytes], seen: set[int]) -> Iterator[Found | Unreadable]:
        with os.scandir(fd) as entries:
            while some := sorted(islice(entries, _SORTED_AT_ONCE), key=lambda entry: entry.name):
                for entry in some:
                    name = os.fsencode(entry.name)
                    path = directory + b"/" + name
                    if path in self._foreign:
                        continue
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            below.append(path)
                        elif entry.is_file(follow_symlinks=False):
                            yield from self._file(fd, name, path, seen)
                    except FileNotFoundError:
                        continue
                    except OSError as error:
                        yield Unreadable(path, error.strerror or str(error))

    def _file(self, directory: int, name: bytes, path: bytes, seen: set[int]) -> Iterator[Found | Unreadable]:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if st.st_nlink > 1:
            if st.st_ino in seen:
                return
            if len(seen) < _REMEMBERED:
                seen.add(st.st_ino)
        if not stat.S_ISREG(st.st_mode):  # it was one a moment ago
            return
        try:
            fd = os.open(name, _TO_READ | os.O_NOFOLLOW, dir_fd=directory)
        except FileNotFoundError:
            return
        except OSError as error:
            yield Unreadable(path, error.strerror or str(error), st)
            return
        try:
            st = os.fstat(fd)
            if stat.S_ISREG(st.st_mode):
                yield Found(path, fd, st)
        finally:
            os.close(fd)

    # -- by its name --------------------------------------------------------------------------------------------

    def look_up(self, path: bytes) -> int:
        """Return an O_PATH descriptor of what an absolute path names to a process of the tree.

        OSError of the lookup; NotJudgedError for a relative path, which depends on a working directory that nobody
        knows, and where we may not look.
        """
        if not path.startswith(b"/"):
            raise NotJudgedError(f"the relative path {os.fsdecode(path)} depends on the working directory")
        try:
            return openat2.open_path(self.fd, path, _IN_ROOT)
        except OSError as error:
            if error.errno in _LOOKUP_ERRORS:
                raise
            raise NotJudgedError(f"{os.fsdecode(path)} cannot be looked up: {error.strerror}") from None

    def path_of(self, fd: int) -> bytes:
        """Return where in the tree a descriptor lies, free of symbolic links. NotJudgedError for what left it."""
        path = os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - bytes
        if not path.startswith(self._prefix + b"/") or (path.endswith(_DELETED) and not os.fstat(fd).st_nlink):
            raise NotJudgedError(f"{os.fsdecode(path)} was moved or deleted meanwhile")
        return path[len(self._prefix) :]

    def read(self, path: bytes, limit: int) -> bytes | None:
        """Return what a regular file holds; None if there is none. NotJudgedError if it is longer than ``limit``."""
        try:
            found = self.look_up(path)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                return None
            with open(reopen(found), "rb") as file:
                data = file.read(limit + 1)
        finally:
            os.close(found)
        if len(data) > limit:
            raise NotJudgedError(f"{os.fsdecode(path)} is longer than {limit} bytes")
        return data

    def names(self, path: bytes) -> list[bytes]:
        """Return the names in a directory; none if there is none. NotJudgedError if they are too many to be real."""
        try:
            found = self.look_up(path)
        except OSError:
            return []
        try:
            fd = os.open(b".", _DIRECTORY, dir_fd=found)
        except NotADirectoryError:
            return []
        except OSError as error:
            raise NotJudgedError(f"{os.fsdecode(path)} cannot be listed: {error.strerror}") from None
        finally:
            os.close(found)
        try:
            with os.scandir(fd) as entries:
                names = [os.fsencode(entry.name) for entry in islice(entries, _SORTED_AT_ONCE)]
        finally:
            os.close(fd)
        if len(names) == _SORTED_AT_ONCE:
            raise NotJudgedError(f"{os.fsdecode(path)} holds more than {len(names)} names")
        return names

    def locate(self, path: bytes) -> mountinfo.Location:
        """Return where a file of the tree lies, by its path free of symbolic links. OSError if it cannot be told."""
        parents = path
        while self._foreign and parents:
            if parents in self._foreign:
                return mountinfo.locate(self._prefix + path)
            parents = parents.rpartition(b"/")[0]
        base = self.location
        return evolve(base, path=base.path.rstrip(b"/") + path)


def reopen(path_fd: int) -> int:
    """Open an O_PATH descriptor of a regular file for reading. NotJudgedError where we may not."""
    try:
        return os.open(b"/proc/self/fd/%d" % path_fd, _TO_READ)
    except PermissionError as error:
        where = os.readlink(b"/proc/self/fd/%d" % path_fd)  # noqa: PTH115 - bytes
        raise NotJudgedError(f"{os.fsdecode(where)} cannot be read: {error.strerror}") from None


def open_tree(directory: str) -> Tree:
    """Open a tree that a user names. UserError for what is no directory."""
    try:
        return Tree(os.fsencode(directory))
    except NotADirectoryError:
        raise UserError(f"{directory}: is no directory") from None
