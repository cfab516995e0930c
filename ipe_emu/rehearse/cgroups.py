"""Control groups of a rehearsed machine: a real hierarchy, whose root is a group made for it.

systemd, as init process, cannot do without: it learns from it which processes belong to which unit, and when the last
one ended. The group is made where this process is in the hierarchy of version 2, if it may make one there: root may,
and a user in a group that was delegated to him (systemd-run --user --scope -p Delegate=yes). A machine is moved into
its group before it makes its cgroup namespace, and mounts cgroup2 by itself.

What goes away with a killed supervisor by itself does not include a group: a watcher removes it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, Self

from attrs import define, field

from ipe_emu.errors import CannotEmulateError
from ipe_emu.event import Subject
from ipe_emu.linux import mounts, process, procfs
from ipe_emu.rehearse.mounting import Found, MountEmulator, MountRequest

#: Controllers that a kernel of a distribution has.
_CONTROLLERS: Final = (
    "cpuset", "cpu", "cpuacct", "blkio", "memory", "devices", "freezer", "net_cls", "perf_event", "net_prio",
    "hugetlb", "pids", "rdma", "misc",
)  # fmt: skip
#: What a group's owner is given when it is delegated (cgroups(7), "Delegation").
_DELEGATED: Final = ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
#: How long a group may be busy once its processes were killed, in seconds; and how often it is tried meanwhile.
_TIME_TO_EMPTY: Final = 10.0
_PAUSE: Final = 0.005
#: The watcher's only descriptor beside the standard ones.
_TOLD: Final = 3
#: A path is at most so long.
_LONGEST: Final = 4096


def controllers() -> bytes:
    """Return /proc/cgroups (``proc_cgroupstats_show()``): no controller is in a hierarchy of its own, of version 1."""
    lines = ["#subsys_name\thierarchy\tnum_cgroups\tenabled", *(f"{name}\t0\t1\t1" for name in _CONTROLLERS)]
    return "".join(f"{line}\n" for line in lines).encode()


def own_group() -> Path:
    """Return the directory of this process's group in the hierarchy of version 2.

    CannotEmulateError if none can be seen.
    """
    own = next(
        (line.removeprefix(b"0::") for line in procfs.read("self", "cgroup").splitlines() if line.startswith(b"0::")),
        None,
    )
    if own is not None:
        for mount in mounts.mounts():
            root = mount.root.rstrip(b"/")
            if mount.kind == b"cgroup2" and (own == root or own.startswith(root + b"/")):
                return Path(os.fsdecode(mount.path + own[len(root) :]))
    raise CannotEmulateError("no hierarchy of version 2 can be seen")


@define(eq=False)
class CgroupKeeper:
    """Makes a machine's group, and sees to it that it goes away with the machine.

    Must be made before this process has threads: the watcher is forked from it.
    """

    _tell: int = field(init=False)
    _watcher: int = field(init=False)
    _group: Path | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        """Fork the watcher. It outlives all who have the other end of its pipe: this process and its descendants."""
        told, self._tell = os.pipe()
        self._watcher = os.fork()
        if self._watcher == 0:
            os.close(self._tell)
            _watch(told)
        os.close(told)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the group, whose processes must be gone, and let the watcher end."""
        if self._group is not None:
            remove(self._group)
        os.close(self._tell)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._watcher, signal.SIGKILL)
        os.waitpid(self._watcher, 0)

    def make(self, owner: int, pid: int) -> None:
        """Make the group, give it to a user, and move a process into it. CannotEmulateError if that cannot be."""
        group = own_group() / f"ipe-emu-{os.getpid()}"
        try:
            os.write(self._tell, os.fsencode(group))
            group.mkdir()
            self._group = group
            if owner != os.getuid():
                for name in _DELEGATED:
                    os.chown(group / name, owner, owner)
            (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise CannotEmulateError(f"no group can be made for it in {group.parent}: {error.strerror}") from None


@define(eq=False)
class WithoutCgroups:
    """What mounting cgroup2 is to a machine without a group of its own (`mounting.MountEmulator`): ``instead``.

    But systemd as its first process would not go on, nor end: then ``give_up`` is told.
    """

    reason: str
    instead: MountEmulator
    give_up: Callable[[Subject, str, str], None]

    def mount(self, request: MountRequest) -> Found:
        """Return what is mounted instead."""
        if request.caller.tracee.status.ns_pids[-1] == 1 and request.caller.tracee.comm() == b"systemd":
            why = (
                f"systemd as init needs a hierarchy of cgroups of its own, and {self.reason}. Run this as root, or as"
                " 'systemd-run --user --scope -p Delegate=yes ipe-emu boot ...'"
            )
            self.give_up(request.caller.subject, "mount", why)
        return self.instead.mount(request)


def remove(group: Path) -> None:
    """Kill what is in a group, and remove it with those below it, as soon as they are empty."""
    end = time.monotonic() + _TIME_TO_EMPTY
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    while group.is_dir() and time.monotonic() < end:
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        if group.is_dir():
            time.sleep(_PAUSE)  # a killed process leaves its group some time after its parent was told of its end


def _watch(told: int) -> NoReturn:
    """Be the watcher."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        process.set_name(b"ipe-emu watcher")
        # Nothing of its parent's may be kept open: who waits for the end of a stream would never see it.
        nothing = os.open(os.devnull, os.O_RDWR)
        for inherited, fd in ((told, _TOLD), (nothing, 0), (nothing, 1), (nothing, 2)):
            os.dup2(inherited, fd)
        process.close_from(_TOLD + 1)
        group = os.read(_TOLD, _LONGEST)
        if group:
            os.read(_TOLD, 1)
            remove(Path(os.fsdecode(group)))
    finally:
        os._exit(0)
