"""mprotect(2) and pkey_mprotect(2) with PROT_EXEC: one MPROTECT event for each mapping that was not executable."""

import errno
import mmap
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.mapped import file_of
from ipe_emu.exec_hook.plan import Continue, Event, Fail, Plan
from ipe_emu.policy.rule import Operation

_PROT_GROWSDOWN: Final = 0x01000000
_PROT_GROWSUP: Final = 0x02000000
# PROT_READ, PROT_WRITE, PROT_EXEC, PROT_SEM; aarch64 adds PROT_BTI and PROT_MTE (arch_validate_prot())
_PROT_KNOWN: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20
_PAGE: Final = mmap.PAGESIZE
_ADDRESS_MASK: Final = (1 << 64) - 1


def plan_mprotect(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan mprotect(start, length, PROT_EXEC|…), and pkey_mprotect(2), whose fourth argument plays no part.

    If a mapping is denied, nothing is changed. The kernel would have changed the mappings before it, none of which
    became executable against the policy.
    """
    start, length, protection = args[:3]
    grows = protection & (_PROT_GROWSDOWN | _PROT_GROWSUP)
    if grows == _PROT_GROWSDOWN | _PROT_GROWSUP or start % _PAGE or protection & ~grows & ~_PROT_KNOWN:
        raise KernelError(errno.EINVAL, "impossible arguments", "do_mprotect_pkey")
    if not length:
        return Plan(Continue())
    end = (start + length + _PAGE - 1) // _PAGE * _PAGE & _ADDRESS_MASK
    if end <= start:
        raise KernelError(errno.ENOMEM, "the range ends where no memory can be", "do_mprotect_pkey")
    events = []
    reached = start
    for mapping in caller.tracee.mappings(start, end):
        if mapping.start > reached and not grows:
            break
        reached = mapping.end
        if not mapping.executable:  # ipe_file_mprotect() lets pass what is executable already
            events.append(Event(Operation.EXECUTE, Hook.MPROTECT, caller.subject, file_of(caller, mapping)))
    if reached < end and not grows:
        hole = KernelError(errno.ENOMEM, "there is a hole in the range", "do_mprotect_pkey")
        return Plan(Fail(hole), tuple(events))
    return Plan(Continue(), tuple(events))
