"""Unpacking members into a directory as the kernel puts them onto its rootfs: with its order, and its silence.

Source: ``do_name()``, ``do_symlink()`` and their like in init/initramfs.c; fs/init.c. The kernel ignores what fails: a
member whose parent directory is missing, or that would replace a directory with something in it, is not there
afterwards, and no message says so.
"""

import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import NotJudgedError, errno_name
from ipe_emu.linux import openat2
from ipe_emu.rehearse.image.archive import Archive, EndOfArchive, Fault
from ipe_emu.rehearse.image.cpio import Entry

#: What a kernel without an initramfs of its own has built in (usr/default_cpio_list).
BUILT_IN: Final = (
    Entry(b"/dev", stat.S_IFDIR | 0o755),
    Entry(b"/dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1)),
    Entry(b"/root", stat.S_IFDIR | 0o700),
)

#: The id that stands for none; chown(2) with it fails on the kernel (make_kuid()), and changes nothing.
_NO_ID: Final = 0xFFFFFFFF
#: symlink(2) takes one byte less than the kernel's own init_symlink(), and not an empty target.
_LONGEST_TARGET: Final = 4095
_MOST_TRIES: Final = 1000
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})
_DEVICES: Final = frozenset({stat.S_IFBLK, stat.S_IFCHR})
_NODES: Final = _DEVICES | {stat.S_IFIFO, stat.S_IFSOCK}


@frozen
class DeviceNode:
    """A device node of the image. An empty regular file stands at each of ``paths``; the machine has to serve it.

    ``mode`` holds the type (S_IFBLK or S_IFCHR) and the permissions.
    """

    paths: tuple[bytes, ...]
    mode: int
    uid: int
    gid: int
    major: int
    minor: int


@frozen
class Skipped:
    """A member that the kernel does not create, without a word: its name, and the errno of what failed."""

    name: bytes
    errno: int

    def __str__(self) -> str:
        return f"{self.name!r} is not unpacked, and the kernel says nothing: {errno_name(self.errno)}"


@frozen
class Difference:
    """Something that is not on the unpacked tree as it would be on the kernel's."""

    name: bytes
    what: str

    def __str__(self) -> str:
        return f"{self.name!r}: {self.what}"


@frozen
class Unpacked:
    """What became of an image. With a ``fault`` the boot goes on with what is there, as the kernel's does."""

    entries: int
    size: int
    nodes: tuple[DeviceNode, ...]
    skipped: tuple[Skipped, ...]
    differences: tuple[Difference, ...]
    fault: Fault | None
    cut: bytes | None


def unpack(members: Archive, root: int, *, built_in: tuple[Entry, ...] = BUILT_IN) -> Unpacked:
    """Unpack ``members`` into the empty directory of the descriptor ``root``, which nobody else may change meanwhile.

    Names are resolved within it: ``..`` and absolute links end at its root, as on the kernel's. To give owners and
    modes, and to write what it may not read, the caller is root of a user namespace; owners that are not mapped there
    become differences. NotJudgedError if the file system is full, or as the members raise it; OSError for faults of
    ``root`` itself.
    """
    rootfs = _Rootfs(root)
    try:
        for entry in chain(built_in, members):
            rootfs.add(entry, members)
        rootfs.set_directory_times()
        return Unpacked(
            rootfs.entries - len(built_in),
            rootfs.size,
            rootfs.device_nodes(),
            tuple(rootfs.skipped),
            tuple(rootfs.differences),
            members.fault,
            members.cut,
        )
    finally:
        rootfs.close()


@define(eq=False)
class _Node:
    """A device node that a regular file stands for."""

    mode: int
    uid: int
    gid: int
    rdev: tuple[int, int]
    paths: list[bytes] = field(factory=list)


@define(eq=False)
class _Rootfs:
    root: int
    entries: int = 0
    size: int = 0
    skipped: list[Skipped] = field(factory=list)
    differences: list[Difference] = field(factory=list)
    # The kernel's hash of find_link(): of members with more than one link, the first name.
    _links: dict[tuple[int, tuple[int, int], int], bytes] = field(factory=dict)
    # By inode number.
    _nodes: dict[int, _Node] = field(factory=dict)
    _directory_times: list[tuple[bytes, int]] = field(factory=list)
    _unmapped: set[tuple[int, int]] = field(factory=set)
    # The directory that was looked up last; forgotten when anything is removed or a link appears.
    _parent_name: bytes | None = None
    _parent: int = -1

    # --- lookup ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._forget_parent()

    def _forget_parent(self) -> None:
        if self._parent_name is not None:
            os.close(self._parent)
            self._parent_name = None

    def _lookup(self, path: bytes) -> int:
        for _ in range(_MOST_TRIES):
            # A rename anywhere on the machine can end a lookup that climbs with EAGAIN, openat2(2).
            with suppress(BlockingIOError):
                return openat2.open_path(self.root, path, openat2.RESOLVE_IN_ROOT | openat2.RESOLVE_NO_MAGICLINKS)
        raise NotJudgedError(f"the lookup of {path!r} was disturbed {_MOST_TRIES} times")

    def _at(self, name: bytes) -> tuple[int, bytes]:
        """Return the directory a name is in, as a descriptor that is good up to the next call, and its last part.

        ``.``, ``..`` and a name that ends in a slash and exists are ``.`` of themselves. OSError as the lookup.
        """
        name = name or b"."  # getname_kernel() has nothing against it, and the lookup stays where it starts
        stripped = name.rstrip(b"/")
        directory, _, last = stripped.rpartition(b"/")
        if last in {b"", b".", b".."}:
            directory, last = name, b"."
        elif stripped != name:
            with suppress(FileNotFoundError):
                found = self._lookup(name)  # a slash at the end follows a link
                os.close(found)
                directory, last = name, b"."
        if last != b"." and name.startswith(b"/"):
            directory = b"/" + directory
        if self._parent_name != directory:
            self._forget_parent()
            self._parent = self._lookup(directory or b".")
            self._parent_name = directory
        return self._parent, last

    def _mode_of(self, at: int, last: bytes) -> int | None:
        """Return a file's type and mode without following it, None if there is none."""
        try:
            found = os.stat(last, dir_fd=at, follow_symlinks=False)
        except OSError:
            return None
        node = self._nodes.get(found.st_ino)
        return node.mode if node is not None and stat.S_ISREG(found.st_mode) else found.st_mode

    # --- members --------------------------------------------------------------------------------------------------

    def add(self, entry: Entry | EndOfArchive, members: Archive) -> None:
        """Do one member; what fails is noted."""
        if isinstance(entry, EndOfArchive):
            self._links.clear()
            return
        self.entries += 1
        try:
            kind = stat.S_IFMT(entry.mode)
            self._clean_path(entry.name, kind if entry.target is None else 0)
            if entry.target is not None:
                self._symlink(entry, entry.target)
            elif kind == stat.S_IFREG:
                self._regular(entry, members)
            elif kind == stat.S_IFDIR:
                self._directory(entry)
            elif kind in _NODES:
                self._node(entry)
            # Of any other type, do_name() makes nothing; what had the name is gone.
        except OSError as error:
            if error.errno in _FULL:
                raise NotJudgedError(f"no room for the image: {error.strerror}, at {entry.name!r}") from error
            self.skipped.append(Skipped(entry.name, error.errno or 0))

    def _regular(self, entry: Entry, members: Archive) -> None:
        linked = self._maybe_link(entry)
        at, last = self._at(entry.name)
        _refuse_slash(entry.name, last, errno.EISDIR)
        fd = os.open(last, _CREATE | (0 if linked else os.O_TRUNC), 0o600, dir_fd=at)
        try:
            self._chown(fd, entry)
            os.fchmod(fd, stat.S_IMODE(entry.mode))
            if entry.size:
                os.ftruncate(fd, entry.size)
            written = 0
            for piece in members.data():
                written += _write(fd, piece)
            self.size += written
            if written == entry.size:  # not if the image ends here
                os.utime(fd, ns=_times(entry.mtime))
        finally:
            os.close(fd)

    def _directory(self, entry: Entry) -> None:
        self._directory_times.append((entry.name, entry.mtime))  # also if it cannot be made now: dir_add()
        at, last = self._at(entry.name)
        failure: OSError | None = None
        try:
            os.mkdir(last, 0o700, dir_fd=at)
        except FileExistsError as error:
            failure = error
        if not stat.S_ISDIR(self._mode_of(at, last) or 0):
            raise failure or OSError(errno.ENOENT, "the directory is not there")
        self._chown(last, entry, at)
        os.chmod(last, stat.S_IMODE(entry.mode), dir_fd=at)

    def _node(self, entry: Entry) -> None:
        if self._maybe_link(entry):
            return
        at, last = self._at(entry.name)
        with self._going_on(entry):
            self._make_node(entry, at, last)
        # What was there already, a node of this type or a directory, stays, and gets the owner and the mode.
        self._own_node(entry, at, last)
        os.utime(last, ns=_times(entry.mtime), dir_fd=at, follow_symlinks=False)

    @contextmanager
    def _going_on(self, entry: Entry) -> Iterator[None]:
        """Note that an entry could not be made, and go on: the kernel's next calls are for what has its name."""
        try:
            yield
        except FileExistsError as error:
            self.skipped.append(Skipped(entry.name, error.errno or errno.EEXIST))

    def _make_node(self, entry: Entry, at: int, last: bytes) -> None:
        _refuse_slash(entry.name, last, errno.EEXIST)
        if self._mode_of(at, last) is not None:
            raise FileExistsError(errno.EEXIST, "there is something of this name")
        if stat.S_IFMT(entry.mode) not in _DEVICES:
            os.mknod(last, stat.S_IFMT(entry.mode) | 0o600, dir_fd=at)
            return
        # Only a machine's root can make a device node, and one of this machine is not what is meant.
        fd = os.open(last, _CREATE | os.O_EXCL, 0o600, dir_fd=at)
        try:
            self._nodes[os.fstat(fd).st_ino] = _Node(entry.mode, entry.uid, entry.gid, entry.rdev, [entry.name])
        finally:
            os.close(fd)

    def _own_node(self, entry: Entry, at: int, last: bytes) -> None:
        node = self._nodes.get(os.stat(last, dir_fd=at, follow_symlinks=False).st_ino)
        if node is None:
            self._chown(last, entry, at)
            os.chmod(last, stat.S_IMODE(entry.mode), dir_fd=at)
            return
        node.mode = entry.mode
        if _NO_ID not in (entry.uid, entry.gid):
            node.uid, node.gid = entry.uid, entry.gid

    def _symlink(self, entry: Entry, target: bytes) -> None:
        at, last = self._at(entry.name)
        if not 0 < len(target) <= _LONGEST_TARGET:
            self.differences.append(
                Difference(entry.name, f"a symbolic link of {len(target)} bytes, which only a kernel can make")
            )
            return
        with self._going_on(entry):
            _refuse_slash(entry.name, last, errno.EEXIST)
            os.symlink(target, last, dir_fd=at)
        self._forget_parent()
        at, last = self._at(entry.name)
        self._chown(last, entry, at)
        os.utime(last, ns=_times(entry.mtime), dir_fd=at, follow_symlinks=False)

    # --- what members have in common ------------------------------------------------------------------------------

    def _clean_path(self, name: bytes, kind: int) -> None:
        """Remove what has the name and another type than ``kind``; a directory only if nothing is in it."""
        try:
            at, last = self._at(name)
        except OSError:
            return  # init_stat() fails as well; what comes after it says why
        if last != b"." and name.endswith(b"/"):
            return  # nothing is there that a slash can stand behind
        mode = self._mode_of(at, last)
        if mode is None or stat.S_IFMT(mode) == kind:
            return
        with suppress(OSError):
            if stat.S_ISDIR(mode):
                if last == b".":
                    at, last = self._at(name.rstrip(b"/"))  # rmdir(2) does not follow a link, slash or no slash
                os.rmdir(last, dir_fd=at)
            else:
                self._unlink(last, at)
        self._forget_parent()

    def _unlink(self, last: bytes, at: int) -> None:
        found = os.stat(last, dir_fd=at, follow_symlinks=False)
        os.unlink(last, dir_fd=at)
        if found.st_nlink == 1:
            self._nodes.pop(found.st_ino, None)  # the number may be used again

    def _maybe_link(self, entry: Entry) -> bool:
        """Make a hard link to an earlier member of the same number; return whether there was one. OSError if not."""
        if entry.nlink < 2:
            return False
        key = (entry.ino, entry.dev, stat.S_IFMT(entry.mode))
        first = self._links.get(key)
        if first is None:
            self._links[key] = entry.name
            return False
        self._clean_path(entry.name, 0)
        source_at, source = self._at(first)
        source_at = os.dup(source_at)
        try:
            at, last = self._at(entry.name)
            _refuse_slash(entry.name, last, errno.EEXIST)
            os.link(source, last, src_dir_fd=source_at, dst_dir_fd=at, follow_symlinks=False)
            node = self._nodes.get(os.stat(last, dir_fd=at, follow_symlinks=False).st_ino)
            if node is not None:
                node.paths.append(entry.name)
        finally:
            os.close(source_at)
        return True

    def _chown(self, what: int | bytes, entry: Entry, at: int | None = None) -> None:
        ids = (entry.uid, entry.gid)
        if _NO_ID in ids:
            return
        try:
            if isinstance(what, int):
                os.fchown(what, *ids)
            else:
                os.chown(what, *ids, dir_fd=at, follow_symlinks=False)
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EINVAL, errno.EOVERFLOW}:
                raise
            if ids not in self._unmapped:
                self._unmapped.add(ids)
                self.differences.append(
                    Difference(entry.name, f"its owner {ids[0]}:{ids[1]} does not exist here; more may have this one")
                )

    # --- the end --------------------------------------------------------------------------------------------------

    def set_directory_times(self) -> None:
        """Give directories their times, the last one first (``dir_utime()``): making files in them changed those."""
        for name, mtime in reversed(self._directory_times):
            with suppress(OSError):
                at, last = self._at(name)
                if last == b"." or not name.endswith(b"/"):
                    os.utime(last, ns=_times(mtime), dir_fd=at, follow_symlinks=False)

    def device_nodes(self) -> tuple[DeviceNode, ...]:
        """Return the device nodes that are left, each with the names it still has."""
        names: dict[int, list[bytes]] = {number: [] for number in self._nodes}
        if any(not self._has_its_names(number, node) for number, node in self._nodes.items()):
            self._find_nodes(names)
        else:
            names = {number: [_absolute(name) for name in node.paths] for number, node in self._nodes.items()}
        return tuple(
            DeviceNode(tuple(names[number]), node.mode, node.uid, node.gid, *node.rdev)
            for number, node in self._nodes.items()
            if names[number]
        )

    def _has_its_names(self, number: int, node: _Node) -> bool:
        """Tell whether a node is still found by the names it was made by, and has no others."""
        if any(b".." in name for name in node.paths):
            return False
        try:
            for name in node.paths:
                at, last = self._at(name)
                found = os.stat(last, dir_fd=at, follow_symlinks=False)
                if found.st_ino != number or found.st_nlink != len(node.paths):
                    return False
        except OSError:
            return False
        return True

    def _find_nodes(self, names: dict[int, list[bytes]]) -> None:
        """Look through the whole tree: links on the way to a node may have gone, or other files have come."""
        for path, _, files, at in os.fwalk(b".", dir_fd=self.root, follow_symlinks=False):
            for file in files:
                number = os.stat(file, dir_fd=at, follow_symlinks=False).st_ino
                if number in names:
                    names[number].append(os.path.join(path, file)[1:])  # noqa: PTH118 - bytes of any kind


def _refuse_slash(name: bytes, last: bytes, exists: int) -> None:
    """Raise what making anything but a directory gives where the name says that it is one (filename_create())."""
    if last == b".":
        raise OSError(exists, os.strerror(exists))
    if name.endswith(b"/"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _absolute(name: bytes) -> bytes:
    return b"/" + posixpath.normpath(name).lstrip(b"/")


def _write(fd: int, data: bytes) -> int:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return len(data)


def _times(mtime: int) -> tuple[int, int]:
    return mtime * 10**9, mtime * 10**9
