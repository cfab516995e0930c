"""remap_file_pages(2): an old mapping replaced by another part of the same file, with the same protection."""

from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.mapped import file_of
from ipe_emu.exec_hook.plan import Continue, Event, Plan
from ipe_emu.policy.rule import Operation


def plan_remap_file_pages(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan remap_file_pages(start, …): an MMAP event if the mapping there is shared and executable."""
    start = args[0]
    for mapping in caller.tracee.mappings(start, start + 1):
        if mapping.executable and mapping.shared:
            event = Event(Operation.EXECUTE, Hook.MMAP, caller.subject, file_of(caller, mapping))
            return Plan(Continue(), (event,))
    return Plan(Continue())
