"""What one process asks of the kernel about itself and its children: prctl(2), pidfds, signals as descriptors."""

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from ipe_emu.linux import syscalls

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends (PR_SET_PDEATHSIG).

    The kernel forgets it when credentials change (``commit_creds()``): ask again after that. The parent may have died
    before the call, so whoever needs certainty also waits for something that ends with the parent, such as a socket.
    """
    syscalls.call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_dumpable(dumpable: bool) -> None:
    """Let, or do not let, this process be traced and its /proc files be opened by its equals (PR_SET_DUMPABLE).

    What may be done to a process that is not dumpable is decided by the user namespace its program was started in:
    root of a namespace made later has no power over it (``__ptrace_may_access()``).
    """
    syscalls.call("prctl", _PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def is_dumpable() -> bool:
    """Whether this process may be traced by its equals (PR_GET_DUMPABLE)."""
    return syscalls.call("prctl", _PR_GET_DUMPABLE, 0, 0, 0, 0) == 1


def close_from(lowest: int) -> None:
    """Close every descriptor from ``lowest`` up."""
    syscalls.call("close_range", lowest, 0xFFFFFFFF, 0)


class SignalInfo(NamedTuple):
    """One received signal; ``from_kernel`` tells a terminal's from a kill(2)."""

    signal: signal.Signals
    from_kernel: bool


_SI_KERNEL: Final = 0x80
#: struct signalfd_siginfo: number, errno, code, and what is not needed here.
_SIGINFO: Final = struct.Struct("=Iii116x")
_SFD_CLOEXEC: Final = os.O_CLOEXEC
_SFD_NONBLOCK: Final = os.O_NONBLOCK


class SignalDescriptor:
    """Signals that arrive by reading (signalfd(2)); they must be blocked in every thread."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        # The kernel's sigset_t: one bit per signal, beginning at 1.
        mask = sum(1 << (number - 1) for number in set(signals))
        self.fd = syscalls.call("signalfd4", -1, struct.pack("=Q", mask), 8, _SFD_CLOEXEC | _SFD_NONBLOCK)

    def pending(self) -> list[SignalInfo]:
        """Return what has arrived since the last call; empty if nothing."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self.fd, _SIGINFO.size):
                number, _, code = _SIGINFO.unpack(content)
                found.append(SignalInfo(signal.Signals(number), code == _SI_KERNEL))
        return found

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def pid_of(pidfd: int) -> int:
    """Return the number of a process in the pid namespace of this process's /proc; -1 if it was waited for."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line[4:])
    raise ValueError("no pidfd")


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal through a pidfd, also into a pid namespace below; nothing happens if the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def set_name(name: bytes) -> None:
    """Set the calling thread's name, at most 15 bytes: what ``ps`` and audit records show (PR_SET_NAME)."""
    syscalls.call("prctl", 15, ctypes.create_string_buffer(name[:15]), 0, 0, 0)
