"""sendfile(2), splice(2), copy_file_range(2): securityfs has none of them, FUSE would carry them out somehow.

From a node they would copy nothing, a silent end of file (its size is 0). Programs fall back to read and write where
the call fails; so it must, and as it does on the kernel.
"""

import errno
import os
import stat
from typing import Final

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Continue, Plan, Return
from ipe_emu.linux.syscalls import signed_int
from ipe_emu.linux.tracee import Tracee

#: SPLICE_F_ALL: any other flag is EINVAL before anything else.
_SPLICE_FLAGS: Final = 0xF


@frozen
class Copy:
    """One of these calls: which arguments are its two descriptors, its length, and its flags if it has some."""

    name: str
    source: int
    target: int
    length: int
    flags: int | None = None


COPIES: Final = (
    Copy("sendfile", source=1, target=0, length=3),
    Copy("splice", source=0, target=2, length=4, flags=5),
    Copy("copy_file_range", source=0, target=2, length=4, flags=5),
)


@frozen
class _End:
    """One of the two files."""

    status: os.stat_result
    flags: int

    @classmethod
    def of(cls, tracee: Tracee, fd: int) -> "_End":
        return cls(tracee.stat_fd(fd), tracee.flags_of_fd(fd))

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    def may(self, access: int) -> bool:
        """Whether it was opened for ``access``: O_RDONLY or O_WRONLY."""
        return not self.flags & os.O_PATH and self.flags & os.O_ACCMODE in (access, os.O_RDWR)


def plan_copy(caller: Caller, args: tuple[int, ...], *, copy: Copy, securityfs: int) -> Plan:
    """Plan a call that copies between two descriptors, of which one is a node of the emulated securityfs.

    ``securityfs`` is its device number. Every error that the kernel finds before it asks the files (EBADF, EISDIR,
    unknown flags) this machine's kernel finds as well. After that, KernelError.
    """
    try:
        source, target = (_End.of(caller.tracee, signed_int(args[index])) for index in (copy.source, copy.target))
    except FileNotFoundError:
        return Plan(Continue())
    if securityfs not in (source.status.st_dev, target.status.st_dev):
        return Plan(Continue())
    if not source.may(os.O_RDONLY) or not target.may(os.O_WRONLY):
        return Plan(Continue())
    if copy.name == "copy_file_range":
        return _copy_file_range(source, target, args[copy.length], args[copy.flags or 0])
    if copy.name == "splice" and (not args[copy.length] or args[copy.flags or 0] & 0xFFFFFFFF & ~_SPLICE_FLAGS):
        return Plan(Continue())  # do_splice() is not reached
    if (
        copy.name == "sendfile"
        and source.status.st_dev != securityfs
        and source.is_regular
        and not source.status.st_size
    ):
        return Plan(Return(0))  # splice_direct_to_actor() stops where nothing was read, and the node is never asked
    raise KernelError(errno.EINVAL, "securityfs does not splice", "do_splice_direct")


def _copy_file_range(source: _End, target: _End, length: int, flags: int) -> Plan:
    if not source.is_regular or not target.is_regular or target.flags & os.O_APPEND or flags & 0xFFFFFFFF:
        return Plan(Continue())  # generic_file_rw_checks()
    if source.status.st_dev != target.status.st_dev:
        raise KernelError(errno.EXDEV, "securityfs has no copy_file_range", "generic_copy_file_checks")
    if not length or not source.status.st_size:
        return Plan(Return(0))  # from one node to another: the first is at its end, whatever it holds
    raise KernelError(errno.EINVAL, "securityfs does not splice", "do_splice_direct")
