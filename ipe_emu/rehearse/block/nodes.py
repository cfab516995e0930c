"""Device nodes of the rehearsed machine: what opening one means, and what fstat(2) and ioctl(2) then say.

A node is a file of our FUSE session that stat(2) shows as the device it stands for. The kernel of this machine would
not open it; so open(2) is answered here, with a descriptor of another file of the session, which reads and writes what
the device does (`ipe_securityfs.subtrees.DiskFile`). There is one such file for each open(2).
"""

import errno
import itertools
import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.access import Access
from ipe_emu.exec_hook.caller import Caller, path_of
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Continue, Install, Perform, Plan, Refuse, Return
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux.seccomp import AnyBit, Masked
from ipe_emu.linux.stat_buffer import FileStatus
from ipe_emu.linux.syscalls import AT_EMPTY_PATH, AT_FDCWD, signed_int
from ipe_emu.linux.user_map import inside, is_mapped
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.block.ioctls import BLK, HDIO_GETGEO, block_ioctl
from ipe_emu.rehearse.block.uevents import UeventFile, Uevents

if TYPE_CHECKING:
    from ipe_securityfs.subtrees import DiskFile, Subtrees

#: The number of /dev/mapper/control (MISC_MAJOR, MAPPER_CTRL_MINOR).
CONTROL: Final = os.makedev(10, 236)
DM_IOCTL: Final = 0xFD

_CAP_CHOWN: Final = 0
_CAP_SYS_ADMIN: Final = 21
_CAP_MKNOD: Final = 27
#: What chown(2) takes for "as it is".
_NO_ID: Final = 0xFFFFFFFF
_OPEN_HOW: Final = struct.Struct("=QQQ")
_O_TMPFILE: Final = 0o20000000 | os.O_DIRECTORY
#: What of the flags of open(2) means something for what is opened in its place.
_KEPT_FLAGS: Final = os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_DIRECT
_FORMATS: Final = frozenset({stat.S_IFBLK, stat.S_IFCHR})


class Control(Protocol):
    """What answers the ioctls of /dev/mapper/control."""

    def ioctl(self, caller: Caller, request: int, argument: int) -> int:
        """Carry out a command; see `device_mapper.control.DeviceMapper`. KernelError, NotJudgedError."""

    def closed(self, number: int) -> None:
        """Hear that a device was closed for the last time; in any thread."""


class Placing(Protocol):
    """Who can make a node where it is wanted."""

    def place(self, caller: Caller, directory: int, name: bytes, mode: int, number: int) -> None:
        """Make a node in a directory, which is an O_PATH descriptor. KernelError as mknod(2)."""

    def is_placed(self, directory: int, name: bytes) -> bool:
        """Whether a name in a directory is a device of this machine that was placed there."""

    def uncover(self, caller: Caller, directory: int, name: bytes) -> None:
        """Take the mount away that makes a name in a directory a node."""


@define(eq=False)
class _OpenNode:
    """What one open(2) gave: a device, or None for the control node (`ipe_securityfs.subtrees.Disk`)."""

    device: BlockDevice | None
    status: FileStatus
    _nodes: "BlockNodes" = field(repr=False)
    exclusive: bool = False
    file: "DiskFile | None" = None
    _openers: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Bytes of the device, as large as it is now."""
        return 0 if self.device is None else self.device.size

    def read(self, offset: int, length: int) -> bytes:
        """Read from the device."""
        if self.device is None:
            raise KernelError(errno.EINVAL, "/dev/mapper/control cannot be read", "vfs_read")
        return self.device.read(offset, length)

    def write(self, offset: int, data: bytes) -> int:
        """Write to the device."""
        if self.device is None:
            raise KernelError(errno.EINVAL, "/dev/mapper/control cannot be written", "vfs_write")
        try:
            return self.device.write(offset, data)
        finally:  # not before: who sees it then reads what is written
            self._nodes.devices.writes += 1

    def opened(self) -> None:
        """Count a file that is open on it: more than the first are opened through /proc/PID/fd."""
        self._openers += 1

    def closed(self) -> None:
        """Forget it with the last."""
        self._openers -= 1
        if not self._openers:
            self._nodes.forget(self)


@define(eq=False)
class BlockNodes:
    """Answers what the machine's processes do with device nodes of disks, partitions and device-mapper.

    ``serve`` must have been called before the first of them runs.
    """

    devices: BlockDevices
    control: Control
    placing: Placing
    uevents: Uevents
    #: The st_dev of the machine's sysfs.
    sysfs: int = field(default=-1, init=False)
    _subtrees: "Subtrees" = field(init=False, repr=False)
    root: int = field(default=-1, init=False)
    _session: int = field(default=-1, init=False)
    _by_ino: dict[int, _OpenNode] = field(factory=dict, init=False, repr=False)
    _names: "Iterator[int]" = field(factory=itertools.count, init=False, repr=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def serve(self, subtrees: "Subtrees", root: int, session: int) -> None:
        """Tell through which session to serve.

        ``root`` is a descriptor of its root directory, which stays open, ``session`` its device number.
        """
        self._subtrees, self.root, self._session = subtrees, root, session

    def forget(self, node: _OpenNode) -> None:
        """Undo what `_open` did, when the last descriptor is closed; in any thread."""
        with self._lock:
            if node.file is not None:
                self._by_ino.pop(node.file.ino, None)
                self._subtrees.remove(node.file)
            if node.device is not None:
                node.device.openers -= 1
                if node.exclusive:
                    self.devices.release(node.device, node)
        if node.device is not None:
            self.control.closed(node.device.number)

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that it answers."""
        block = (self._plan_ioctl, Masked(1, 0xFF00, BLK << 8))
        mapper = (self._plan_ioctl, Masked(1, 0xFF00, DM_IOCTL << 8))
        return (
            Trap("open", self._plan_open),
            Trap("openat", self._plan_openat),
            Trap("openat2", self._plan_openat2),
            Trap("creat", self._plan_creat),
            Trap("ioctl", *block),
            Trap("ioctl", *mapper),
            Trap("ioctl", self._plan_ioctl, Masked(1, 0xFFFF, HDIO_GETGEO)),
            Trap("fstat", self._plan_fstat),
            Trap("newfstatat", self._plan_newfstatat, AnyBit(3, AT_EMPTY_PATH)),
            Trap("statx", self._plan_statx, AnyBit(2, AT_EMPTY_PATH)),
            *self.making,
        )

    @property
    def making(self) -> Sequence[Trap]:
        """Those of them that make nodes, and take them away."""
        return (
            Trap("mknod", self._plan_mknod, AnyBit(1, stat.S_IFBLK & stat.S_IFCHR)),
            Trap("mknodat", self._plan_mknodat, AnyBit(2, stat.S_IFBLK & stat.S_IFCHR)),
            Trap("unlink", self._plan_unlink),
            Trap("unlinkat", self._plan_unlinkat),
            Trap("chown", self._plan_chown),
            Trap("lchown", self._plan_chown),
            Trap("fchownat", self._plan_fchownat),
            Trap("rename", self._plan_rename),
            Trap("renameat", self._plan_renameat),
            Trap("renameat2", self._plan_renameat),
        )

    def is_mapper(self, st: os.stat_result) -> bool:
        """Whether it is the directory /dev/mapper, whose names are the session's own."""
        return (st.st_dev, st.st_ino) == (self._session, self._subtrees.mapper.ino)

    # -- open(2) ----------------------------------------------------------------------------------------------------

    def _plan_open(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan(caller, AT_FDCWD, args[0], args[1])

    def _plan_creat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan(caller, AT_FDCWD, args[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def _plan_openat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan(caller, signed_int(args[0]), args[1], args[2])

    def _plan_openat2(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        try:
            flags, _mode, resolve = _OPEN_HOW.unpack(caller.copy_in(args[2], _OPEN_HOW.size))
        except KernelError:
            return None
        plan = self._plan(caller, signed_int(args[0]), args[1], flags)
        if plan is not None and resolve:
            raise NotJudgedError("a device node that is opened by openat2(2) with restrictions on its path")
        return plan

    def _plan(self, caller: Caller, directory: int, address: int, flags: int) -> Plan | None:
        if flags & (os.O_PATH | os.O_DIRECTORY) or flags & _O_TMPFILE == _O_TMPFILE:
            return None
        try:
            path = read_path(caller.tracee, address)
            fd = caller.look_up(directory, path, follow=not flags & os.O_NOFOLLOW)
        except (OSError, NotJudgedError):
            return None  # the kernel finds the same; and if it should find a node of ours, it does not open it
        st = os.fstat(fd)
        told = self._told_by(st, fd) if flags & os.O_ACCMODE != os.O_RDONLY else None
        if not self._is_ours(st) and told is None:
            return None
        if flags & os.O_CREAT and flags & os.O_EXCL:
            return None  # EEXIST
        _check_access(caller.access, st, flags)
        if told is not None:
            return Plan(Install(lambda: self._open_uevent(told, flags), bool(flags & os.O_CLOEXEC)))
        status = _status(caller, st)
        return Plan(Install(lambda: self._open(status, flags), bool(flags & os.O_CLOEXEC)))

    def _is_ours(self, st: os.stat_result) -> bool:
        """Whether it is a node of the session: character devices that this machine lends are not."""
        return stat.S_IFMT(st.st_mode) in _FORMATS and (stat.S_ISBLK(st.st_mode) or st.st_dev == self._session)

    def _told_by(self, st: os.stat_result, fd: int) -> BlockDevice | None:
        """Return the device whose file ``uevent`` of sysfs an O_PATH descriptor is open on, if it is one."""
        if st.st_dev != self.sysfs:
            return None
        *_, name, last = (b"/" + path_of(fd)).split(b"/")
        return self.devices.named(os.fsdecode(name)) if last == b"uevent" else None

    def _open_uevent(self, device: BlockDevice, flags: int) -> int:
        with self._lock:
            name = b"uevent-%d" % next(self._names)
        opened: list[DiskFile] = []
        file = UeventFile(device, self.uevents, lambda: self._subtrees.remove(opened[0]))
        opened.append(self._subtrees.add_disk(name, file))
        try:
            return os.open(b"images/" + name, flags & _KEPT_FLAGS | os.O_CLOEXEC, dir_fd=self.root)
        except OSError:
            self._subtrees.remove(opened[0])
            raise

    def _open(self, status: FileStatus, flags: int) -> int:
        """Open what a node stands for (``blkdev_open()``, ``misc_open()``)."""
        device = self.devices.find(status.rdev) if stat.S_ISBLK(status.mode) else None
        if device is None and (stat.S_ISBLK(status.mode) or status.rdev != CONTROL):
            raise KernelError(errno.ENXIO, "no device has this number", "blkdev_get_no_open")
        node = _OpenNode(device, status, self)
        with self._lock:
            if device is not None:
                if flags & os.O_EXCL:
                    self.devices.claim(device, node)
                    node.exclusive = True
                device.openers += 1
            name = b"node-%d" % next(self._names)
            node.file = self._subtrees.add_disk(name, node)
            self._by_ino[node.file.ino] = node
        try:
            fd = os.open(b"images/" + name, flags & _KEPT_FLAGS | os.O_CLOEXEC, dir_fd=self.root)
        except OSError:
            self.forget(node)
            raise
        return fd

    # -- on what is open --------------------------------------------------------------------------------------------

    def _opened(self, caller: Caller, fd: int) -> _OpenNode | None:
        """Return what the caller's descriptor is open on, None if it is none of ours."""
        try:
            st = caller.tracee.stat_fd(fd)
        except FileNotFoundError:
            return None
        return self._by_ino.get(st.st_ino) if st.st_dev == self._session else None

    def _plan_ioctl(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        number = signed_int(args[0])
        node = self._opened(caller, number)
        if node is None:
            return None
        if node.device is None:
            return Plan(Perform(lambda: self.control.ioctl(caller, args[1] & 0xFFFFFFFF, args[2])))
        asking = _Asking(caller, args[2], caller.tracee.flags_of_fd(number) & os.O_ACCMODE != os.O_RDONLY)
        device = node.device

        def act() -> int:
            block_ioctl(self.devices, device, args[1], asking)
            return 0

        return Plan(Perform(act))

    def _plan_fstat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_status(caller, args[0], args[1])

    def _plan_newfstatat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_status(caller, args[0], args[2]) if _is_empty(caller, args[1]) else None

    def _plan_statx(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_status(caller, args[0], args[4], extended=True) if _is_empty(caller, args[1]) else None

    def _plan_status(self, caller: Caller, fd: int, address: int, *, extended: bool = False) -> Plan | None:
        node = self._opened(caller, signed_int(fd))
        if node is None:
            return None
        status = node.status

        def act() -> int:
            caller.copy_out(address, status.statx() if extended else status.stat())
            return 0

        return Plan(Perform(act))

    # -- mknod(2) ---------------------------------------------------------------------------------------------------

    def _plan_mknod(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_new(caller, AT_FDCWD, *args[:3])

    def _plan_mknodat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_new(caller, signed_int(args[0]), *args[1:4])

    def _plan_new(self, caller: Caller, directory: int, address: int, mode: int, number: int) -> Plan | None:
        number &= 0xFFFFFFFF  # new_decode_dev()
        if stat.S_IFMT(mode) not in _FORMATS:
            return None
        path = read_path(caller.tracee, address)
        if not caller.capable(_CAP_MKNOD):
            raise KernelError(errno.EPERM, "CAP_MKNOD is missing", "vfs_mknod")
        parent, name = _split(path)
        if not name or name in {b".", b".."}:
            return None  # ENOENT or EEXIST, as the kernel finds
        where = caller.look_up(directory, parent)
        permissions = stat.S_IMODE(mode) & ~caller.tracee.status.umask

        def act() -> int:
            self.placing.place(caller, where, name, stat.S_IFMT(mode) | permissions, number)
            return 0

        return Plan(Perform(act))

    # -- chown(2) -----------------------------------------------------------------------------------------------------

    def _plan_chown(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_giving(caller, AT_FDCWD, *args[:3])

    def _plan_fchownat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_giving(caller, signed_int(args[0]), *args[1:4])

    def _plan_giving(self, caller: Caller, directory: int, address: int, user: int, group: int) -> Plan | None:
        """Let a node be given to ids that do not exist here, and have it stay whose it is.

        Device-mapper's library gives its nodes to the group disk, and fails where it cannot.
        """
        pid = caller.tracee.pid
        ids = (("uid_map", user & _NO_ID), ("gid_map", group & _NO_ID))
        if all(number == _NO_ID or is_mapped(pid, which, number) for which, number in ids):
            return None
        if not caller.capable(_CAP_CHOWN):
            return None
        try:
            st = os.fstat(caller.look_up(directory, read_path(caller.tracee, address)))
        except (OSError, NotJudgedError):
            return None
        is_node = stat.S_IFMT(st.st_mode) in _FORMATS and st.st_dev == self._session
        return Plan(Return(0)) if is_node else None

    # -- unlink(2) and rename(2) --------------------------------------------------------------------------------------

    def _plan_unlink(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_removal(caller, AT_FDCWD, args[0])

    def _plan_unlinkat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_removal(caller, signed_int(args[0]), args[1])

    def _plan_removal(self, caller: Caller, directory: int, address: int) -> Plan | None:
        """Take the mount away that makes a file a node, so that the kernel can unlink the file."""
        found = self._node_at(caller, directory, address)
        if found is None:
            return None
        kept, name = os.dup(found.directory), found.name  # by then the caller's are closed

        def uncover() -> None:
            try:
                self.placing.uncover(caller, kept, name)
            finally:
                os.close(kept)

        return Plan(Continue(uncover))

    def _plan_rename(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_renaming(caller, (AT_FDCWD, args[0]), (AT_FDCWD, args[1]))

    def _plan_renameat(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan_renaming(caller, (signed_int(args[0]), args[1]), (signed_int(args[2]), args[3]))

    def _plan_renaming(self, caller: Caller, *names: tuple[int, int]) -> Plan | None:
        if any(self._node_at(caller, *name) is not None for name in names):
            return Plan(Refuse("renaming a device node"))
        return None

    def _node_at(self, caller: Caller, directory: int, address: int) -> "_Name | None":
        """Return the name of a node that is a mount of ours: one in /dev/mapper is none, it can simply be removed."""
        try:
            path = read_path(caller.tracee, address)
            parent, name = _split(path)
            where = caller.look_up(directory, parent)
            st = os.fstat(caller.look_up(directory, path, follow=False))
        except (OSError, NotJudgedError):
            return None
        if stat.S_IFMT(st.st_mode) not in _FORMATS or self.is_mapper(os.fstat(where)):
            return None
        return _Name(where, name) if st.st_dev == self._session or self.placing.is_placed(where, name) else None


@define(eq=False)
class _Asking:
    """A caller of an ioctl of the block layer (`ioctls.Caller`)."""

    _caller: Caller
    _argument: int
    may_write: bool

    @property
    def capable(self) -> bool:
        return self._caller.capable(_CAP_SYS_ADMIN)

    def copy_in(self, length: int) -> bytes:
        return self._caller.copy_in(self._argument, length)

    def copy_out(self, data: bytes) -> None:
        self._caller.copy_out(self._argument, data)


@frozen
class _Name:
    """A name in a directory, which is an O_PATH descriptor of the caller's."""

    directory: int
    name: bytes


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Return the directory and the last name of a path; the name is empty if the path ends with a slash."""
    parent, slash, name = path.rpartition(b"/")
    return parent or (b"/" if slash else b"."), name


def _is_empty(caller: Caller, address: int) -> bool:
    """Whether a path argument is empty; a null pointer counts as well (since Linux 6.11)."""
    try:
        return address == 0 or caller.copy_in(address, 1) == b"\0"
    except KernelError:
        return False


def _check_access(access: Access, st: os.stat_result, flags: int) -> None:
    """Raise KernelError EACCES where the mode bits do not let the caller open a node (``inode_permission()``)."""
    if access.override:
        return
    if st.st_uid == access.fsuid:
        bits = st.st_mode >> 6
    elif st.st_gid == access.fsgid or st.st_gid in access.groups:
        bits = st.st_mode >> 3
    else:
        bits = st.st_mode
    wanted = {os.O_RDONLY: 4, os.O_WRONLY: 2}.get(flags & os.O_ACCMODE, 6)
    if wanted & ~bits:
        raise KernelError(errno.EACCES, "the node's mode does not permit it", "inode_permission")


def _status(caller: Caller, st: os.stat_result) -> FileStatus:
    """Return what fstat(2) says of an opened node: what stat(2) says of the node, with ids as the caller has them."""
    return FileStatus(
        dev=st.st_dev,
        ino=st.st_ino,
        mode=st.st_mode,
        nlink=st.st_nlink,
        uid=inside(caller.tracee.pid, "uid_map", st.st_uid),
        gid=inside(caller.tracee.pid, "gid_map", st.st_gid),
        rdev=st.st_rdev,
        blksize=st.st_blksize,
        atime_ns=st.st_atime_ns,
        mtime_ns=st.st_mtime_ns,
        ctime_ns=st.st_ctime_ns,
    )
