"""Mounts as /proc/PID/mountinfo lists them, and where on its file system a file lies (proc_pid_mountinfo(5))."""

import errno
import functools
import os
import re
import select
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from attrs import define, field, frozen

from ipe_emu.linux import namespaces, procfs, statx

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


@frozen
class MountEntry:
    """One mount: ``root`` is the directory of its file system that it shows, ``point`` where it is mounted.

    ``device`` is ``major:minor`` of the superblock; ``point`` is seen from the root directory of the process that was
    asked. ``source`` is whatever was given to mount(2).
    """

    id: int
    device: str
    root: bytes
    point: bytes
    kind: str
    source: bytes
    #: Those of the superblock, as its file system shows them.
    options: tuple[bytes, ...] = ()

    @property
    def superblock_name(self) -> str:
        """What the kernel calls the superblock in audit records (``s_id``): the block device's name, or the type."""
        if self.device.startswith("0:"):
            # btrfs has anonymous device numbers and names its superblock after a device all the same.
            return self._source_name() if self.kind == "btrfs" else self.kind.partition(".")[0]
        try:
            return Path(f"/sys/dev/block/{self.device}").readlink().name.replace("!", "/")
        except OSError:
            return self._source_name()

    def _source_name(self) -> str:
        return os.fsdecode(self.source.rpartition(b"/")[2])

    def within(self, path: bytes) -> bytes | None:
        """Return where on the file system ``path`` lies, seen from the same root as ``point``; None if not here."""
        below = _below(self.point, path)
        if below is None:
            return None
        return self.root.rstrip(b"/") + b"/" + below if below else self.root


@frozen
class Location:
    """Where a file lies, whatever its file system is mounted on: the same through every bind mount of it.

    ``path`` is its path on the file system with the device number ``device``, of type ``kind``; ``mount_root`` is the
    directory of that file system beyond which the mount it was reached by shows nothing.
    """

    device: str
    path: bytes
    mount_root: bytes
    kind: str = ""


def of(pid: int | str) -> Mapping[int, MountEntry]:
    """Return the mounts that a process sees, by their ids."""
    return _parse(procfs.read(pid, "mountinfo"))


@define(eq=False)
class OwnMounts:
    """The mounts that this process sees, for any thread of it. They are read again only when they have changed."""

    _fd: int | None = field(default=None, init=False)
    _changed: select.poll = field(factory=select.poll, init=False)
    _by_device: Mapping[str, MountEntry] = field(factory=dict, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    def of_device(self, device: str) -> MountEntry | None:
        """Return a mount of the file system with a device number (``major:minor``), the same one as long as it lasts.

        None if this process sees none.
        """
        with self._lock:
            if self._fd is None:
                self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._fd)
                # Until it is polled, a change since it was opened is one (``mounts_poll()``).
                self._changed.register(self._fd, select.POLLPRI)
                self._read()
            elif self._changed.poll(0):
                self._read()
            return self._by_device.get(device)

    def _read(self) -> None:
        self._by_device = {mount.device: mount for mount in of("self").values()}


@define(eq=False)
class Superblocks:
    """What is known of the superblocks of a rehearsed machine beyond what /proc tells.

    ``names`` are the names of those that stand for others (``s_id``), by their device number ``major:minor``;
    ``mounts`` are mounts that processes may use when nobody sees them any more, by their ids, their ``point`` counted
    from the root of the mount namespace. Both may change while they are used.
    """

    names: dict[str, str] = field(factory=dict)
    mounts: dict[int, MountEntry] = field(factory=dict)

    def location(self, pid: int, mount_id: int, path: bytes) -> Location | None:
        """Return where a file lies on its file system; None if neither ``pid`` nor an ancestor sees its mount.

        ``mount_id`` is the mount it was reached by. ``path`` is how /proc/self/fd of a process outside names it: from
        the root of the mount namespace, whatever the root directory of ``pid``.
        """
        found = self._seen_by(pid, mount_id)
        if found is None:
            return None
        mount, root = found
        seen = _below(root, path)
        within = None if seen is None else mount.within(b"/" + seen)
        return None if within is None else Location(mount.device, within, mount.root, mount.kind)

    def name_of(self, pid: int, mount_id: int, device: int) -> str | None:
        """Return what audit records call the superblock of a mount that process ``pid`` uses (``s_id``).

        Where nobody sees the mount, as with a detached one, any mount of the same file system will do (``device`` is
        its st_dev). None if there is none.
        """
        found = self._seen_by(pid, mount_id)
        if found is not None:
            return self._name(found[0])
        mount = self.mount_of(pid, f"{os.major(device)}:{os.minor(device)}")
        return None if mount is None else self._name(mount)

    def mount_of(self, pid: int, device: str) -> MountEntry | None:
        """Return a mount of the file system with this device number that ``pid`` or an ancestor sees."""
        mounts = (mount for process in _with_ancestors(pid) for mount in of(process).values())
        return next((mount for mount in mounts if mount.device == device), None)

    def _name(self, mount: MountEntry) -> str:
        return self.names.get(mount.device) or mount.superblock_name

    def _seen_by(self, pid: int, mount_id: int) -> tuple[MountEntry, bytes] | None:
        """Return a mount, and the root directory that its ``point`` counts from.

        A process sees the mounts below its root directory only. Where it changed that, an ancestor is asked, the last
        of which is the first process of its pid namespace, or of ours; or else, where it has a mount namespace of its
        own, this process looks itself.
        """
        for process in _with_ancestors(pid):
            mount = of(process).get(mount_id)
            root = None if mount is None else _root_of(process)
            if mount is not None and root is not None:
                return mount, root
        mount = self.mounts.get(mount_id) or _of_namespace(pid).get(mount_id)
        return None if mount is None else (mount, b"/")


#: Of this machine, where nothing stands for anything else.
OF_THIS_MACHINE: Final = Superblocks()


def locate(path: bytes) -> Location:
    """Return where an existing file lies; ``path`` is free of symbolic links. OSError if it cannot be told."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = OF_THIS_MACHINE.location(os.getpid(), statx.mount_id(fd), path)
    finally:
        os.close(fd)
    if found is None:
        raise OSError(errno.EXDEV, "its mount cannot be seen", path)
    return found


def _of_namespace(pid: int) -> Mapping[int, MountEntry]:
    """Return all mounts of the mount namespace of a process; none if this process may not look."""
    # Of this /proc, which that namespace need not have; "mountinfo" in it is that of the thread which opens it.
    threads = os.open(f"/proc/{os.getpid()}/task", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def read() -> bytes:
        fd = os.open(f"{threading.get_native_id()}/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=threads)
        with open(fd, "rb") as stream:  # noqa: PTH123 - a descriptor
            return stream.read()

    try:
        return _parse(namespaces.in_mount_namespace_of(pid, read))
    except OSError:
        return {}
    finally:
        os.close(threads)


def _root_of(pid: int) -> bytes | None:
    """Return the root directory of a process, or None if this process may not know it."""
    try:
        return procfs.root_path(pid)
    except PermissionError:
        # The first process of a pid namespace just below ours is the sandbox's own, and stays at its root; it lets
        # nobody look at it, so that the tree cannot.
        return b"/" if procfs.is_first_of_child_namespace(pid) else None


def _with_ancestors(pid: int) -> Iterator[int]:
    while pid:
        yield pid
        pid = procfs.parent(pid)


def _below(directory: bytes, path: bytes) -> bytes | None:
    if path == directory:
        return b""
    prefix = directory.rstrip(b"/") + b"/"
    return path[len(prefix) :] if path.startswith(prefix) else None


@functools.lru_cache(maxsize=8)
def _parse(mountinfo: bytes) -> Mapping[int, MountEntry]:
    entries = {}
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(b" - ")
        number, _, device, root, point = fields.split(b" ")[:5]
        kind, source, *options = tail.split(b" ")[:3]
        entries[int(number)] = MountEntry(
            int(number),
            device.decode(),
            _unescaped(root),
            _unescaped(point),
            os.fsdecode(kind),
            _unescaped(source),
            # Apart first: a comma within one is escaped (``seq_show_option()``).
            tuple(map(_unescaped, options[0].split(b","))) if options else (),
        )
    return MappingProxyType(entries)


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), field) if b"\\" in field else field
