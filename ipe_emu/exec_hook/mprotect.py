"""mprotect(2) and pkey_mprotect(2) with PROT_EXEC: one MPROTECT event for each mapping that was not executable."""

import errno
import mmap
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.mapped import file_of
from ipe_emu.exec_hook.plan import Continue, Event, Plan
from ipe_emu.linux.syscalls import MACHINE
from ipe_emu.linux.tracee import Mapping
from ipe_emu.policy.rule import Operation

_PROT_GROWSDOWN: Final = 0x01000000
_PROT_GROWSUP: Final = 0x02000000
_PROT_SEM: Final = 0x8
# What arch_validate_prot() knows besides reading, writing and executing; aarch64 adds PROT_BTI and PROT_MTE.
_PROT_KNOWN: Final = {"x86_64": _PROT_SEM, "aarch64": _PROT_SEM | 0x10 | 0x20}
# Each permission, and the flag of a mapping that may have it (VM_MAYREAD, VM_MAYWRITE, VM_MAYEXEC).
_PERMISSIONS: Final = ((mmap.PROT_READ, b"mr"), (mmap.PROT_WRITE, b"mw"), (mmap.PROT_EXEC, b"me"))
_GROWS_DOWN: Final = b"gd"
# Memory without a file, which may have every permission; others in brackets are the kernel's own.
_ANONYMOUS: Final = (b"[heap]", b"[stack]", b"[anon:")
_PAGE: Final = mmap.PAGESIZE
_ADDRESS_MASK: Final = (1 << 64) - 1


def plan_mprotect(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan mprotect(start, length, PROT_EXEC|…), and pkey_mprotect(2), whose fourth argument plays no part.

    What the kernel finds wrong with a mapping, or that there is none, ends the questions; it is then left to the kernel
    to change the mappings before it and to say so. If a mapping is denied, nothing is changed. The kernel would have
    changed the mappings before it, none of which became executable against the policy.
    """
    start, length, protection = args[:3]
    grows = protection & (_PROT_GROWSDOWN | _PROT_GROWSUP)
    protection &= ~grows
    if grows == _PROT_GROWSDOWN | _PROT_GROWSUP or start % _PAGE:
        raise KernelError(errno.EINVAL, "impossible arguments", "do_mprotect_pkey")
    if not length:
        return Plan(Continue())
    end = (start + length + _PAGE - 1) // _PAGE * _PAGE & _ADDRESS_MASK
    if end <= start:
        raise KernelError(errno.ENOMEM, "the range ends where no memory can be", "do_mprotect_pkey")
    if protection & ~sum(bit for bit, _ in _PERMISSIONS) & ~_PROT_KNOWN.get(MACHINE, 0):
        raise KernelError(errno.EINVAL, "unknown kinds of protection", "arch_validate_prot")
    events: list[Event] = []
    reached = None
    for mapping in caller.tracee.mappings(start, end):
        if reached is None:
            _check_first(caller, mapping, start, grows)
        elif mapping.start > reached:
            break
        if _is_beyond(caller, mapping, protection):
            break
        reached = mapping.end
        if not mapping.executable:  # ipe_file_mprotect() lets pass what is executable already
            events.append(Event(Operation.EXECUTE, Hook.MPROTECT, caller.subject, file_of(caller, mapping)))
    return Plan(Continue(), tuple(events))


def _check_first(caller: Caller, mapping: Mapping, start: int, grows: int) -> None:
    """Raise KernelError if a range cannot begin with a mapping."""
    if grows == _PROT_GROWSDOWN:
        flags = caller.tracee.flags_of_mapping(mapping)
        if flags is not None and _GROWS_DOWN not in flags:
            raise KernelError(errno.EINVAL, "the mapping does not grow down", "do_mprotect_pkey")
    elif mapping.start > start:
        raise KernelError(errno.ENOMEM, "nothing is mapped there", "do_mprotect_pkey")
    elif grows:  # not on x86_64, nor on aarch64
        raise KernelError(errno.EINVAL, "no mapping grows up", "do_mprotect_pkey")


def _is_beyond(caller: Caller, mapping: Mapping, protection: int) -> bool:
    """Whether a mapping cannot have a protection, for how its file was opened, or where it lies (EACCES)."""
    if not mapping.path or mapping.path.startswith(_ANONYMOUS):
        return False
    flags = caller.tracee.flags_of_mapping(mapping)
    return flags is not None and any(protection & bit and flag not in flags for bit, flag in _PERMISSIONS)
