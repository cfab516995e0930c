"""mmap(2) with PROT_EXEC, and the rarer ways to a new executable mapping."""

import errno
import mmap
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Continue, Event, Passes, Plan, Refuse
from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.linux.syscalls import signed_int
from ipe_emu.policy.rule import Operation

PROT_EXEC: Final = 4
_MAP_ANONYMOUS: Final = 0x20
_MAP_HUGETLB: Final = 0x40000


def plan_mmap(caller: Caller, args: tuple[int, ...], passes: Passes) -> Plan:
    """Plan mmap(address, length, PROT_EXEC|…, flags, fd, offset): one MMAP event (``security_mmap_file()``).

    It comes before the kernel looks at anything but the offset and the descriptor: even a length of 0 is asked about.
    """
    flags = args[3]
    if args[5] % mmap.PAGESIZE:  # of anonymous memory too, which has none
        raise KernelError(errno.EINVAL, "the offset is not that of a page", "sys_mmap")
    if flags & _MAP_ANONYMOUS:
        if flags & _MAP_HUGETLB:
            return Plan(Refuse("executable huge pages: the kernel makes a file for them that cannot be known before"))
        if passes(Operation.EXECUTE, NO_FACTS):
            return Plan(Continue())
        return Plan(Continue(), (Event(Operation.EXECUTE, Hook.MMAP, caller.subject, None),))
    number = signed_int(args[4])
    fd = caller.descriptor(number)
    if fd is not None and passes(Operation.EXECUTE, caller.facts(fd)):
        return Plan(Continue())
    if fd is None or not caller.may_use(number):
        raise KernelError(errno.EBADF, f"descriptor {number} is not open on a file", "ksys_mmap_pgoff")
    return Plan(Continue(), (Event(Operation.EXECUTE, Hook.MMAP, caller.subject, caller.file(fd)),))
