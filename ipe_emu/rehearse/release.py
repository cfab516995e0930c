"""uname(2): the rehearsed machine runs the kernel that its image was made for."""

import re
from collections.abc import Sequence
from typing import Final

from attrs import define, field

from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Perform, Plan
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux import syscalls
from ipe_emu.profiles import UPSTREAM_OF_OP_POLICY, Profile
from ipe_emu.rehearse.requests import Agent

#: Bytes of each of the six fields of struct new_utsname, with the NUL at its end.
_FIELD: Final = 65


def release_of(profile: Profile, said: str | None, modules: Sequence[str]) -> str:
    """Return the kernel's release: what the image itself says, or the only one that it has modules for.

    Where that does not tell, it is the first of the emulated kernel's own series.
    """
    if said:
        return said
    if len(modules) == 1:
        return modules[0]
    found = re.search(r"\d+\.\d+", profile.name) or re.search(r"\d+\.\d+", UPSTREAM_OF_OP_POLICY.name)
    return f"{found[0] if found else '0.0'}.0"


@define(eq=False)
class Uname:
    """Answers uname(2) with ``release``, which is to be set before the machine starts.

    modprobe(8) looks for modules by it: with this machine's own, a boot would load none, and none would be judged.
    """

    agent: Agent
    release: str = field(default="", init=False)

    @property
    def traps(self) -> Sequence[Trap]:
        """The call that it answers."""
        return (Trap("uname", self._plan),)

    def _plan(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        return Plan(Perform(lambda: self._uname(caller, args[0])))

    def _uname(self, caller: Caller, address: int) -> int:
        node, version = self.agent.uname(caller.tracee.pid)
        fields = ("Linux", node, self.release, version, syscalls.MACHINE, "(none)")
        packed = b"".join(word.encode(errors="surrogateescape")[: _FIELD - 1].ljust(_FIELD, b"\0") for word in fields)
        caller.copy_out(address, packed)
        return 0
