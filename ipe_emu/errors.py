"""The two families of errors: what a kernel would answer, and what a user got wrong."""

import errno as _errno
import os


class IpeEmuError(Exception):
    """Base of every error this project raises on purpose."""


class KernelError(IpeEmuError, OSError):
    """What the kernel answers to a system call: an errno, and the reason a person can act on.

    ``function`` names the kernel function that gives this answer, so that it can be looked up.
    """

    errno: int

    def __init__(self, errno: int, reason: str = "", function: str = "") -> None:
        super().__init__(errno, reason or os.strerror(errno))
        self.reason = reason or os.strerror(errno)
        self.function = function

    @property
    def name(self) -> str:
        """The errno's symbol, such as ``EBADMSG`` (EKEYREJECTED and its kin included)."""
        return errno_name(self.errno)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class UserError(IpeEmuError, ValueError):
    """Bad usage or bad input at the command line (exit 2): what was wrong, where, and what to do."""


class NotJudgedError(IpeEmuError):
    """Something that matters could not be judged (exit 4, or 125 from ``run``). Never a silent pass."""


class CannotEmulateError(IpeEmuError):
    """This machine lacks what the emulation needs and nothing was started (exit 77)."""


def errno_name(number: int | None) -> str:
    """Return the symbol of an errno, or its decimal number if it has none."""
    if number is None:
        return "E?"
    return _errno.errorcode.get(number, str(number))
