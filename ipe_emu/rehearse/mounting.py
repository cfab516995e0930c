"""mount(2), umount2(2) and pivot_root(2) of a rehearsed machine.

What a user namespace may mount by itself, the kernel of this machine mounts. What stands for the file systems of a
real machine (proc, sysfs, devtmpfs, securityfs) is a copy of what the agent has staged, however often and wherever it
is mounted. Block devices are the affair of those who know them: see `MountEmulator`.
"""

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.caller import Caller, path_of
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Continue, Fail, Perform, Plan
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux import mounts, procfs, statx
from ipe_emu.linux.mountinfo import Superblocks
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.rehearse.events import Mounted, NotJudged, Timeline
from ipe_emu.rehearse.requests import Agent
from ipe_emu.rehearse.staging import CGROUP2, DEVTMPFS, EMPTY, MAPPER_ROOT, PROC, SECURITYFS, SYSFS

CAP_SYS_ADMIN: Final = 21
_MS_REMOUNT: Final = 0x20
_MS_BIND: Final = 0x1000
_MS_MOVE: Final = 0x2000
_MS_REC: Final = 0x4000
_MS_PROPAGATION: Final = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20
_MS_MGC_VAL: Final = 0xC0ED0000
_MS_MGC_MSK: Final = 0xFFFF0000
#: Those of mount(2) have the same numbers as attributes of mounts.
_ATTRIBUTES: Final = Attribute.RDONLY | Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
#: copy_mount_string() and copy_mount_options() take no more.
_LONGEST: Final = 4096

#: What this machine's kernel mounts for a user namespace that has everything of its own, where no emulator is asked.
_NATIVE: Final = frozenset({"cgroup2", "tmpfs", "ramfs", "devpts", "mqueue", "overlay"})
#: Pseudo file systems that are empty here. None of them can hold a program.
_EMPTY: Final = frozenset({
    "configfs", "debugfs", "tracefs", "pstore", "bpf", "fusectl", "efivarfs", "selinuxfs", "hugetlbfs",
})  # fmt: skip
_NOTHING_RUNS: Final = Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC


@frozen
class MountRequest:
    """One mount(2) of a new file system, whose arguments were read; ``target`` is an O_PATH descriptor."""

    caller: Caller
    source: bytes
    target: int
    kind: str
    flags: int
    data: bytes


@frozen
class Found:
    """What is to be mounted: a staged path or a detached mount, and with which attributes beside the caller's own.

    ``note`` says how it differs from what a kernel would mount. A detached mount is closed when it is mounted.
    """

    source: Path | int
    attributes: Attribute = Attribute.NONE
    note: str = ""


class MountEmulator(Protocol):
    """Makes what stands for a file system. Is called when the call is carried out, in the thread that answers."""

    def mount(self, request: MountRequest) -> Found:
        """Find what is to be mounted, or make it. KernelError as the kernel answers, NotJudgedError if unknown."""


@frozen
class Staged:
    """A file system of which a machine has one, such as sysfs: a copy of what is staged."""

    source: Path
    attributes: Attribute = Attribute.NONE
    note: str = ""

    def mount(self, _request: MountRequest) -> Found:
        """Return it."""
        return Found(self.source, self.attributes, self.note)


#: By type, what every machine has.
EVERY_MACHINE_HAS: Final[Mapping[str, MountEmulator]] = {
    "proc": Staged(PROC, Attribute.NODEV | Attribute.NOEXEC),
    "sysfs": Staged(SYSFS, Attribute.NODEV | Attribute.NOEXEC),
    "devtmpfs": Staged(DEVTMPFS),
    "securityfs": Staged(SECURITYFS),
    "cgroup2": Staged(CGROUP2, _NOTHING_RUNS, "empty here"),
    **{kind: Staged(EMPTY, _NOTHING_RUNS, "empty here") for kind in _EMPTY},
}
#: What /proc/filesystems lists of all this, in its two columns.
FILE_SYSTEMS: Final = tuple(f"nodev\t{kind}\n" for kind in sorted(_NATIVE | EVERY_MACHINE_HAS.keys()))


@define(eq=False)
class Mounting:
    """Answers the calls. ``emulators`` are asked by type; ``nullfs``: what is below the first root (`Profile`).

    To be set before the machine starts: ``root_mount``, the id of the machine's first root, ``devices``, the st_dev of
    what is staged, and ``proc_parts``, what is mounted on names in every proc (see `Agent.compose`).
    """

    agent: Agent
    timeline: Timeline
    emulators: Mapping[str, MountEmulator]
    superblocks: Superblocks
    nullfs: bool
    root_mount: int = field(default=-1, init=False)
    devices: dict[Path, int] = field(factory=dict, init=False)
    proc_parts: list[tuple[Path | None, str]] = field(factory=list, init=False)
    _detached: list[int] = field(factory=list, init=False)

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that it answers."""
        return (
            Trap("mount", self._plan_mount),
            Trap("umount2", self._plan_umount),
            Trap("pivot_root", self._plan_pivot_root),
        )

    # -- mount(2) ---------------------------------------------------------------------------------------------------

    def _plan_mount(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        flags = args[3]
        if flags & _MS_MGC_MSK == _MS_MGC_VAL:
            flags &= ~_MS_MGC_MSK
        if not caller.capable(CAP_SYS_ADMIN):
            return None
        if flags & _MS_BIND and not flags & (_MS_REMOUNT | _MS_REC):
            return self._plan_bind(caller, args)
        if flags & (_MS_REMOUNT | _MS_BIND | _MS_MOVE | _MS_PROPAGATION):
            return None
        kind = _string(caller, args[2])
        if kind is None:
            raise KernelError(errno.EINVAL, "no type of file system", "do_new_mount")
        if kind == binfmt_misc.NAME:
            return None  # the exec hook refuses it
        name = os.fsdecode(kind)
        target = caller.look_up(AT_FDCWD, read_path(caller.tracee, args[1]))
        emulator = self.emulators.get(name)
        if emulator is None and name in _NATIVE:
            return None
        if emulator is None:
            reason = f"there is no file system of type {name!r} here: mount(2) failed with ENODEV"
            self.timeline.add(NotJudged(self.timeline.now, caller.subject, "mount", reason))
            return Plan(Fail(KernelError(errno.ENODEV, reason, "get_fs_type")))
        source, data = _string(caller, args[0]), _string(caller, args[4])
        request = MountRequest(caller, source or b"", target, name, flags, data or b"")
        return Plan(Perform(lambda: self._mount(request, emulator)))

    def _plan_bind(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan MS_BIND alone, which leaves behind what is mounted on the source: ours is to come along."""
        source = caller.look_up(AT_FDCWD, read_path(caller.tracee, args[0]))
        status = os.fstat(source)
        staged = next((path for path in (DEVTMPFS, PROC) if self.devices[path] == status.st_dev), None)
        if staged is None or not stat.S_ISDIR(status.st_mode):
            return None
        target = caller.look_up(AT_FDCWD, read_path(caller.tracee, args[1]))
        if _is_root(caller, source):
            return Plan(Perform(lambda: self._attach(caller, target, staged, Attribute.NONE)))
        return Plan(Perform(lambda: self._copy(caller, source, target)))

    def _copy(self, caller: Caller, source: int, target: int) -> int:
        self.agent.copy(caller.tracee.pid, source, target)
        return 0

    def _attach(self, caller: Caller, target: int, source: Path | int, attributes: Attribute) -> int:
        if source == PROC:
            self.agent.compose(caller.tracee.pid, target, source, self.proc_parts, attributes)
        else:
            self.agent.attach(caller.tracee.pid, target, source, attributes)
        return 0

    def _mount(self, request: MountRequest, emulator: MountEmulator) -> int:
        found = emulator.mount(request)
        try:
            if isinstance(found.source, Path):
                self._refuse_the_same_again(request, found.source)
            attributes = found.attributes | Attribute(request.flags) & _ATTRIBUTES
            self._attach(request.caller, request.target, found.source, attributes)
        finally:
            if isinstance(found.source, int):
                os.close(found.source)
        target = os.fsdecode(request.caller.below_root(path_of(request.target)))
        self.timeline.add(Mounted(self.timeline.now, request.caller.subject, request.kind, target, found.note))
        return 0

    def _refuse_the_same_again(self, request: MountRequest, source: Path) -> None:
        """Fail where the target is the root of a mount of the very same file system (``do_add_mount()``)."""
        if os.fstat(request.target).st_dev == self.devices.get(source) and _is_root(request.caller, request.target):
            raise KernelError(errno.EBUSY, f"this {request.kind} is mounted there already", "do_add_mount")

    # -- umount2(2) -------------------------------------------------------------------------------------------------

    def _plan_umount(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        if not caller.capable(CAP_SYS_ADMIN):
            return Plan(Continue())
        flags = args[1]
        target = caller.look_up(AT_FDCWD, read_path(caller.tracee, args[0]), follow=not flags & _UMOUNT_NOFOLLOW)
        if self.nullfs and statx.mount_id(target) == self.root_mount and _is_root(caller, target):
            return self._plan_umount_of_first_root(caller, target, flags)
        # Of these the machine's kernel would say that they are busy, for what we have mounted on them.
        composed = {self.devices[DEVTMPFS], self.devices[PROC]}
        if os.fstat(target).st_dev not in composed or not _is_root(caller, target):
            return Plan(Continue())
        if not flags & _MNT_DETACH and self._is_busy(caller, statx.mount_id(target)):
            raise KernelError(errno.EBUSY, "somebody uses it", "do_umount")
        return Plan(Perform(lambda: self._detach(caller, target)))

    def _plan_umount_of_first_root(self, caller: Caller, target: int, flags: int) -> Plan:
        """Plan it where another root may have taken its place, and it is a mount like any other (``nullfs``)."""
        if statx.mount_id(caller.root()) == self.root_mount:
            # Here it is locked, and the answer would be EINVAL.
            if flags & _MNT_DETACH:
                raise NotJudgedError("the first root would be detached while it is the root")
            raise KernelError(errno.EBUSY, "it is the root", "do_umount")
        if not flags & _MNT_DETACH:
            return Plan(Continue(lambda: self.superblocks.mounts.pop(self.root_mount, None)))
        # Whoever uses it goes on to, and while it is known by its id, no other mount may have that.
        self._detached.append(os.dup(target))
        return Plan(Continue())

    def _detach(self, caller: Caller, target: int) -> int:
        self.agent.detach(caller.tracee.pid, target)
        return 0

    def _is_busy(self, caller: Caller, mount_id: int) -> bool:
        """Whether the machine mounted something on it, or one of its processes has something open there."""
        root = b"/proc/%d/root" % caller.tracee.pid
        ours = {mount_id}
        for mount in mounts.mounts(caller.tracee.pid):
            if mount.parent == mount_id:
                is_ours = (mount.device, mount.root) == (self.devices[SECURITYFS], MAPPER_ROOT) or (
                    mount.device == self.devices[PROC] and mount.root != b"/"  # a part that is read-only
                )
                if not is_ours and stat.S_ISDIR(os.lstat(root + mount.path).st_mode):
                    return True
                ours.add(mount.id)  # a device, a text, or /dev/mapper
        namespace = procfs.namespace(caller.tracee.pid, "mnt")
        return any(procfs.uses_mounts(pid, ours) for pid in procfs.processes() if _namespace_of(pid) == namespace)

    # -- pivot_root(2) ----------------------------------------------------------------------------------------------

    def _plan_pivot_root(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        if not caller.capable(CAP_SYS_ADMIN) or statx.mount_id(caller.root()) != self.root_mount:
            return Plan(Continue())
        new, old = (caller.look_up(AT_FDCWD, read_path(caller.tracee, address)) for address in args[:2])
        # path_pivot_root() asks in this order: is the new root locked, is one of them busy, has the root a parent?
        if statx.mount_id(new) == self.root_mount and not self.nullfs:
            raise KernelError(errno.EINVAL, "the rootfs cannot be the new root", "path_pivot_root")
        if self.root_mount in (statx.mount_id(new), statx.mount_id(old)):
            raise KernelError(errno.EBUSY, "nothing goes to where the old root is", "path_pivot_root")
        if not self.nullfs:
            raise KernelError(errno.EINVAL, "the root is the rootfs, which is mounted on nothing", "path_pivot_root")
        return Plan(Continue())


def _string(caller: Caller, address: int) -> bytes | None:
    """Read a string argument; None for a null pointer."""
    if address == 0:
        return None
    try:
        found = caller.tracee.string(address, _LONGEST)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise KernelError(errno.EFAULT, "a string that cannot be read", "copy_mount_string") from None
    if found is None:
        raise KernelError(errno.EINVAL, "a string of a page or more", "copy_mount_string")
    return found


def _is_root(caller: Caller, fd: int) -> bool:
    """Whether a descriptor is open on the root of a mount that the caller sees."""
    mount_id = statx.mount_id(fd)
    path = caller.below_root(path_of(fd))
    return any(mount.id == mount_id and mount.path == path for mount in mounts.mounts(caller.tracee.pid))


def _namespace_of(pid: int) -> int | None:
    try:
        return procfs.namespace(pid, "mnt")
    except OSError:
        return None
