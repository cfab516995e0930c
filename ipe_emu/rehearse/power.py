"""reboot(2) and the sysrq trigger: what ends a machine; and sync(2), which who ends it calls before."""

import errno
from collections.abc import Callable, Sequence
from typing import Final

from attrs import define

from ipe_emu.errors import KernelError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Perform, Plan, Return
from ipe_emu.exec_hook.traps import Trap

_CAP_SYS_BOOT: Final = 22
_MAGIC1: Final = 0xFEE1DEAD
_MAGIC2: Final = frozenset({672274793, 85072278, 369367448, 537993216})
_CAD: Final = frozenset({0x00000000, 0x89ABCDEF})  # Ctrl-Alt-Del off and on
_ENDS: Final = {
    0x01234567: "restarted",
    0xA1B2C3D4: "restarted",
    0xCDEF0123: "halted",
    0x4321FEDC: "powered off",
}
_KEXEC: Final = 0x45584543
_UNSIGNED_INT: Final = 0xFFFFFFFF
#: Commands of the sysrq trigger that end the machine (Documentation/admin-guide/sysrq.rst).
_SYSRQ: Final = {b"b": "restarted", b"o": "powered off", b"c": "crashed"}


@define(eq=False)
class Power:
    """Tells ``end`` how the machine ended, and by what means; that one has to kill it."""

    end: Callable[[str, str, Caller | None], None]

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that it answers."""
        return (Trap("reboot", self._plan_reboot), Trap("sync", self._plan_sync))

    def sysrq(self, command: bytes) -> None:
        """Take a command that was written to the trigger (``write_sysrq_trigger()``): its first letter counts."""
        how = _SYSRQ.get(command[:1])
        if how is not None:
            self.end(how, f"sysrq-trigger: {command[:1].decode()}", None)

    def _plan_reboot(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        if not caller.capable(_CAP_SYS_BOOT):
            raise KernelError(errno.EPERM, "without CAP_SYS_BOOT", "reboot")
        if args[0] & _UNSIGNED_INT != _MAGIC1 or args[1] & _UNSIGNED_INT not in _MAGIC2:
            raise KernelError(errno.EINVAL, "wrong magic numbers", "reboot")
        command = args[2] & _UNSIGNED_INT
        if command in _CAD:
            return Plan(Return(0))
        how = _ENDS.get(command)
        if how is None:
            why = "no kernel is loaded" if command == _KEXEC else "no such command here"
            raise KernelError(errno.EINVAL, why, "reboot")
        return Plan(Perform(lambda: self._end(how, caller)))

    def _plan_sync(self, _caller: Caller, _args: tuple[int, ...]) -> Plan:
        # What a machine writes to its disks is in their images at once. Carried out, the call would wait until the
        # disks of this machine have everything that anybody has written.
        return Plan(Return(0))

    def _end(self, how: str, caller: Caller) -> int:
        self.end(how, "reboot(2)", caller)
        return 0
