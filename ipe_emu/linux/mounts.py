"""Mounts as descriptors (open_tree(2), move_mount(2), fsopen(2), mount_setattr(2)), and reading mountinfo."""

import contextlib
import errno
import os
import re
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final, NamedTuple

from ipe_emu.linux import namespaces, syscalls
from ipe_emu.linux.syscalls import AT_EMPTY_PATH, AT_FDCWD, AT_RECURSIVE, AT_SYMLINK_NOFOLLOW


class Attribute(IntFlag):
    """What holds for one mount, as mount_setattr(2) and fsmount(2) want it (MOUNT_ATTR_…)."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    IDMAP = 0x100000


class Propagation(IntEnum):
    """Where mounts and unmounts below a mount spread to (mount_namespaces(7))."""

    UNCHANGED = 0
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20


_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

#: struct mount_attr: to set, to clear, propagation, user namespace.
_MOUNT_ATTR: Final = struct.Struct("=QQQQ")


def make_private() -> None:
    """Stop mounts and unmounts of this mount namespace from spreading to others, and theirs to it."""
    syscalls.call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)


def mount(kind: bytes, target: bytes) -> None:
    """Mount a file system that has no device, by the call that a filter may answer (mount(2))."""
    syscalls.call("mount", kind, target, kind, 0, None)


def clone(path: Path, *, recursive: bool, follow: bool = True) -> int:
    """Return a detached copy of the mount at ``path``, and with ``recursive`` of those below it, as a descriptor.

    Without ``follow`` a symbolic link at its end is what is copied.

    Where a more privileged user namespace made the mounts below, they hide what lies under them and only a recursive
    copy is allowed (EINVAL, ``has_locked_children()``).
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE * recursive | AT_SYMLINK_NOFOLLOW * (not follow)
    return syscalls.call("open_tree", AT_FDCWD, os.fsencode(path), flags)


def clone_at(fd: int, *, recursive: bool) -> int:
    """Return the same of what a descriptor is open on (O_PATH)."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE * recursive
    return syscalls.call("open_tree", fd, b"", flags)


def clone_in_namespace_of(pid: int, fd: int) -> int:
    """Return a detached copy of the mount that ``fd`` leads to, from the directory it is open on; and of those below.

    The mount is one of process ``pid``'s mount namespace. OSError if that process may not be looked at, or the copy is
    not allowed.
    """
    return namespaces.in_mount_namespace_of(pid, lambda: clone_at(fd, recursive=True))


def attach(mount: int, path: Path) -> None:
    """Mount a detached mount on ``path``, following symlinks."""
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        attach_at(mount, target)
    finally:
        os.close(target)


def attach_at(mount: int, target: int) -> None:
    """Mount a detached mount on what ``target`` is open on (O_PATH), in this process's mount namespace."""
    syscalls.call("move_mount", mount, b"", target, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def detach(path: bytes) -> None:
    """Unmount what is mounted on ``path``, with all below it, whoever uses it still (MNT_DETACH).

    A symbolic link at its end is not followed.
    """
    syscalls.call("umount2", path, _MNT_DETACH | _UMOUNT_NOFOLLOW)


def abort(path: bytes) -> None:
    """End the connection of the FUSE mount on ``path`` to its server (MNT_FORCE): whoever waits for it fails.

    It is unmounted as well; OSError EBUSY if it is in use, when all else is done.
    """
    syscalls.call("umount2", path, _MNT_FORCE | _UMOUNT_NOFOLLOW)


def set_attributes(
    mount: int | Path,
    attributes: Attribute,
    *,
    clear: Attribute = Attribute.NONE,
    propagation: Propagation = Propagation.UNCHANGED,
    recursive: bool = False,
    user_namespace: int = 0,
) -> None:
    """Set and clear attributes of a mount, given by a descriptor of its root or by its mount point.

    ``user_namespace`` is the descriptor that Attribute.IDMAP wants.
    """
    at, path = (mount, b"") if isinstance(mount, int) else (AT_FDCWD, os.fsencode(mount))
    packed = _MOUNT_ATTR.pack(attributes, clear, propagation, user_namespace)
    syscalls.call("mount_setattr", at, path, AT_EMPTY_PATH | AT_RECURSIVE * recursive, packed, len(packed))


def new_filesystem(kind: bytes, options: Mapping[bytes, bytes | None], attributes: Attribute = Attribute.NONE) -> int:
    """Make an instance of a file system (options without a value are None) and return it as a detached mount.

    An OSError carries what the file system said of its reason, where it says one.
    """
    context = syscalls.call("fsopen", kind, _FSOPEN_CLOEXEC)
    try:
        try:
            for name, value in options.items():
                command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
                syscalls.call("fsconfig", context, command, name, value, 0)
            syscalls.call("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
            return syscalls.call("fsmount", context, _FSMOUNT_CLOEXEC, attributes)
        except OSError as error:
            said = "; ".join(_messages(context)) or os.strerror(error.errno or 0)
            raise OSError(error.errno, f"mounting {kind.decode()}: {said}") from None
    finally:
        os.close(context)


def attach_new(kind: bytes, options: Mapping[bytes, bytes | None], attributes: Attribute, path: Path) -> None:
    """Make an instance of a file system and mount it on ``path``."""
    mount = new_filesystem(kind, options, attributes)
    try:
        attach(mount, path)
    finally:
        os.close(mount)


def new_superblock(kind: bytes) -> None:
    """Make an instance of a file system for this process's user namespace, mounted nowhere, and let go of it."""
    context = syscalls.call("fsopen", kind, _FSOPEN_CLOEXEC)
    try:
        syscalls.call("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
    finally:
        os.close(context)


def _messages(context: int) -> Iterator[str]:
    # One read gives one message, "e fuse: Invalid rootmode"; ENODATA ends them.
    with contextlib.suppress(OSError):
        while message := os.read(context, 4096):
            yield message.decode(errors="replace")[2:].strip()


def pivot_root_into(directory: Path) -> None:
    """Make the mount at ``directory`` the root of this mount namespace, and let go of the old root."""
    os.chdir(directory)
    # The old root is stacked on the new one and then taken off: no directory is needed to put it in.
    syscalls.call("pivot_root", b".", b".")
    detach(b".")
    os.chdir("/")


class MountInfo(NamedTuple):
    """One line of /proc/PID/mountinfo (proc_pid_mountinfo(5)); paths are unescaped."""

    id: int
    parent: int
    device: int
    root: bytes
    path: bytes
    kind: bytes
    source: bytes


def mounts(pid: int | str = "self") -> tuple[MountInfo, ...]:
    """Return the mounts that a process can reach from its root, parents before children."""
    return tuple(map(parse_mountinfo, Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines()))


def parse_mountinfo(line: bytes) -> MountInfo:
    """Parse one line of mountinfo; blanks, newlines and backslashes in paths are octal there."""
    first, _, second = line.partition(b" - ")
    number, parent, device, root, path, *_ = first.split(b" ")
    kind, source, *_ = second.split(b" ")
    major, _, minor = device.partition(b":")
    return MountInfo(
        int(number), int(parent), os.makedev(int(major), int(minor)), *map(_unescape, (root, path, kind, source))
    )


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field)


def mount_at(path: Path | bytes, pid: int | str = "self") -> MountInfo:
    """Return the mount whose root is at ``path`` (the topmost one). FileNotFoundError if none is.

    Reads mountinfo only: the file system itself is not asked, and may be one that nobody serves yet.
    """
    for mount in reversed(mounts(pid)):
        if mount.path == os.fsencode(path):
            return mount
    raise FileNotFoundError(errno.ENOENT, "nothing is mounted there", os.fsdecode(path))


def is_mounted(path: Path) -> bool:
    """Whether something is mounted at ``path``, as far as mountinfo says."""
    try:
        mount_at(path)
    except FileNotFoundError:
        return False
    return True
