"""The machine's first namespaces look like those that a kernel starts with, and not like a container's.

systemd does less in a container: it does not read the kernel's command line, and loads no policies. It knows one by the
inode of its pid namespace, and by files that no root of a hierarchy of cgroups has (``detect_container()`` in
src/basic/virt.c).
"""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Fail, Perform, Plan, Return
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux import procfs
from ipe_emu.linux.seccomp import Masked
from ipe_emu.linux.stat_buffer import FileStatus
from ipe_emu.linux.syscalls import AT_EMPTY_PATH

#: Inodes of a kernel's first namespaces (include/linux/proc_ns.h).
_FIRST: Final = {
    "ipc": 0xEFFFFFFF, "uts": 0xEFFFFFFE, "user": 0xEFFFFFFD, "pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB,
    "time": 0xEFFFFFFA,
}  # fmt: skip
_OWN: Final = re.compile(rb"/proc/(?:self|thread-self)/ns/([a-z]+)")
_ALL: Final = 0xFFFFFFFF
#: What a group has, and the root of a kernel's hierarchy has not (CFTYPE_NOT_ON_ROOT).
_NOT_ON_ROOT: Final = re.compile(rb"/sys/fs/cgroup/+cgroup\.(events|type|freeze|kill|max\.depth|max\.descendants)")
#: Where /dev is no devtmpfs, and tables of mounts say that it is none here, systemd takes the lack of this for a sign
#: that there will be no udev (``dev_is_devtmpfs()`` in src/libsystemd/sd-device/device-monitor.c).
_UDEV_CONTROL: Final = b"/run/udev/control"


@define(eq=False)
class FirstNamespaces:
    """Answers stat(2) of the links in /proc/self/ns, and access(2) of files in the root of the hierarchy of cgroups.

    ``init`` is the pid of the machine's first process, which is to be set before the machine starts.
    """

    init: int = field(default=-1, init=False)

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that it answers."""
        return (
            Trap("stat", lambda caller, args: self._plan_stat(caller, args[0], args[1])),
            # With the flags of stat(2): most others are fstat(2), and lstat(2) is of the link.
            Trap("newfstatat", lambda caller, args: self._plan_stat(caller, args[1], args[2]), Masked(3, _ALL, 0)),
            Trap("access", lambda caller, args: self._plan_access(caller, args[0])),
            Trap("faccessat", lambda caller, args: self._plan_access(caller, args[1])),
            Trap("faccessat2", lambda caller, args: self._plan_access(caller, args[1]), Masked(3, AT_EMPTY_PATH, 0)),
        )

    def _plan_stat(self, caller: Caller, path: int, address: int) -> Plan | None:
        found = _OWN.fullmatch(_path(caller, path))
        kind = os.fsdecode(found[1]) if found else ""
        if kind not in _FIRST or not self._is_first(caller, kind):
            return None
        st = Path(f"/proc/{caller.tracee.pid}/ns/{kind}").stat()
        status = FileStatus(
            dev=st.st_dev, ino=_FIRST[kind], mode=st.st_mode, nlink=st.st_nlink, uid=0, gid=0, rdev=st.st_rdev,
            blksize=st.st_blksize, atime_ns=st.st_atime_ns, mtime_ns=st.st_mtime_ns, ctime_ns=st.st_ctime_ns,
        )  # fmt: skip

        def act() -> int:
            caller.copy_out(address, status.stat())
            return 0

        return Plan(Perform(act))

    def _plan_access(self, caller: Caller, path: int) -> Plan | None:
        name = _path(caller, path)
        if name == _UDEV_CONTROL and caller.tracee.pid == self.init:
            return Plan(Return(0))
        if not _NOT_ON_ROOT.fullmatch(name) or not self._is_first(caller, "cgroup"):
            return None
        return Plan(Fail(KernelError(errno.ENOENT, "the root of the hierarchy has no such file", "cgroup_addrm_files")))

    def _is_first(self, caller: Caller, kind: str) -> bool:
        return procfs.namespace(caller.tracee.pid, kind) == procfs.namespace(self.init, kind)


def _path(caller: Caller, address: int) -> bytes:
    """Read a path; nothing if it cannot be read, which the kernel finds out too."""
    try:
        return read_path(caller.tracee, address)
    except (KernelError, NotJudgedError):
        return b""
