"""mount(2) and fsopen(2), as far as they could have files executed that the emulated kernel would not execute.

There is one such file system, binfmt_misc. The new way through fsopen(2) ends in an instance too, before anything is
mounted; open_tree(2) and fspick(2) only lead to instances that there are already.

And a mount can be made noexec. In a user namespace the flags that a mount was inherited with are locked, and mount(2)
refuses whatever would clear one (``can_change_locked_flags()``), as it does by not naming it. Whoever goes on after
that error would execute files that a kernel without the restriction does not. mount_setattr(2) clears only what it is
told to.
"""

import errno
import mmap
import os
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Continue, Plan, Refuse
from ipe_emu.linux.syscalls import AT_FDCWD

_CAP_SYS_ADMIN: Final = 21
_MS_REMOUNT: Final = 0x20
_MS_BIND: Final = 0x1000
# Those of mount(2) have the same numbers (MS_RDONLY, …), and so has MS_NOEXEC.
_LOCKABLE: Final = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
# copy_mount_string() takes no longer one, fsopen(2) not even that
_LONGEST_NAME: Final = mmap.PAGESIZE


def plan_mount(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan mount(source, target, type, flags, data): refused for binfmt_misc, whose registry would be a new one.

    Refused as well where it would make a mount noexec and clear another of its flags.
    """
    flags = args[3]
    if flags & (_MS_REMOUNT | _MS_BIND):  # nothing is made, and the type plays no part (path_mount())
        if flags & _MS_REMOUNT and flags & _MS_BIND and flags & os.ST_NOEXEC and _clears_a_flag(caller, args[1], flags):
            return Plan(Refuse("making a mount noexec that keeps other flags here which the call does not name"))
        return Plan(Continue())
    return _plan(caller, args[2])


def plan_fsopen(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan fsopen(type, flags) in the same way."""
    return _plan(caller, args[0])


def _clears_a_flag(caller: Caller, address: int, flags: int) -> bool:
    if not caller.tracee.status.capable(_CAP_SYS_ADMIN):
        return False
    try:
        target = caller.look_up(AT_FDCWD, read_path(caller.tracee, address))
    except KernelError:
        return False  # the kernel will say the same
    now = os.fstatvfs(target).f_flag
    return not now & os.ST_NOEXEC and bool(now & _LOCKABLE & ~flags)


def _plan(caller: Caller, address: int) -> Plan:
    if not caller.tracee.status.capable(_CAP_SYS_ADMIN):
        return Plan(Continue())  # EPERM from the kernel
    try:
        kind = caller.tracee.string(address, _LONGEST_NAME)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return Plan(Continue())  # EFAULT from the kernel
    if kind != binfmt_misc.NAME:
        return Plan(Continue())
    return Plan(Refuse("binfmt_misc, under which the kernel runs interpreters of its own choice"))
