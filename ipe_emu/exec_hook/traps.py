"""System calls that parts of the emulator trap beside those that the exec hook judges itself."""

from collections.abc import Callable

from attrs import frozen

from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Plan
from ipe_emu.linux.seccomp import Action, Condition, Rule

#: Plans one call of a caller, from its six arguments; None says that the call is none of its own.
Handler = Callable[[Caller, tuple[int, ...]], Plan | None]


@frozen
class Trap:
    """A system call, by name, that ``handler`` wants to see where ``when`` holds.

    Several traps may be set for one call. They are asked in order, and before what the exec hook does itself; if all
    say that it is none of theirs, the call goes on as if there were none.
    """

    syscall: str
    handler: Handler
    when: Condition | None = None

    @property
    def rule(self) -> Rule:
        """What makes the call arrive."""
        return Rule(self.syscall, Action.NOTIFY, self.when)
