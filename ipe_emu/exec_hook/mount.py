"""mount(2) and fsopen(2): the one file system by which a tree could have files executed that nobody is asked about.

The new way through fsopen(2) ends in an instance too, before anything is mounted. open_tree(2) and fspick(2) only
lead to instances that there are already.
"""

import errno
import mmap
from typing import Final

from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Continue, Plan, Refuse

_CAP_SYS_ADMIN: Final = 21
_MS_REMOUNT: Final = 0x20
_MS_BIND: Final = 0x1000
# copy_mount_string() takes no longer one, fsopen(2) not even that
_LONGEST_NAME: Final = mmap.PAGESIZE


def plan_mount(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan mount(source, target, type, flags, data): refused for binfmt_misc, whose registry would be a new one."""
    if args[3] & (_MS_REMOUNT | _MS_BIND):  # nothing is made, and the type plays no part (path_mount())
        return Plan(Continue())
    return _plan(caller, args[2])


def plan_fsopen(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan fsopen(type, flags) in the same way."""
    return _plan(caller, args[0])


def _plan(caller: Caller, address: int) -> Plan:
    if not caller.tracee.status.capable(_CAP_SYS_ADMIN):
        return Plan(Continue())  # EPERM from the kernel
    try:
        kind = caller.tracee.string(address, _LONGEST_NAME)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return Plan(Continue())  # EFAULT from the kernel
    if kind != binfmt_misc.NAME:
        return Plan(Continue())
    return Plan(Refuse("binfmt_misc, under which the kernel runs interpreters of its own choice"))
