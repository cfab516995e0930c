"""The error of a policy's text: what the kernel answers, and what a person needs to mend it."""

from ipe_emu.errors import KernelError
from ipe_emu.policy.rule import Position


class PolicyError(KernelError, ValueError):
    """A text that the kernel does not take as a policy.

    ``errno`` is the kernel's answer and ``function`` the kernel function that gives it; ``filename`` and ``position``
    say where, ``reason`` what is wrong, ``suggestion`` what was probably meant (empty if there is nothing to suggest).
    """

    def __init__(
        self,
        errno: int,
        reason: str,
        position: Position,
        *,
        filename: str = "<policy>",
        suggestion: str = "",
        function: str = "",
    ) -> None:
        super().__init__(errno, reason, function)
        self.position = position
        self.filename = filename
        self.suggestion = suggestion

    def __str__(self) -> str:
        text = f"{self.filename}:{self.position.line}:{self.position.column}: {self.reason}"
        return f"{text}; {self.suggestion}" if self.suggestion else text
