"""ptrace(2), for one purpose: a process that dies of SIGSEGV at the moment its execve(2) has succeeded."""

import contextlib
import errno
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ipe_emu.linux import syscalls

_PTRACE_DETACH: Final = 17
_PTRACE_GETREGSET: Final = 0x4204
_PTRACE_SETREGSET: Final = 0x4205
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_OPTION_TRACE_EXEC: Final = 0x10
_EVENT_EXEC: Final = 4
_NT_PRSTATUS: Final = 1
_WALL: Final = 0x40000000

# Where the program counter stands in the general registers (struct user_regs_struct, struct user_pt_regs).
_PROGRAM_COUNTER_OFFSET: Final = {"x86_64": 16 * 8, "aarch64": 32 * 8}
_REGISTERS_SIZE: Final = 512
_IOVEC: Final = struct.Struct("@PN")

# How long to rest between two looks at a thread that may change its id, in seconds.
_REST: Final = 0.0005


def kill_at_exec(thread: int, process: int, release: Callable[[], None]) -> None:
    """Have ``thread`` of ``process``, which waits in execve(2), die of SIGSEGV if that execve succeeds.

    ``release`` lets it go on with the call. An execve that fails returns its error to the program, which lives on.
    Raises OSError if it cannot be traced (another tracer is there, Yama forbids it, the registers of this machine are
    not known here): ``release`` was not called then.

    The death is a real fault, a jump to address 0: like ``force_fatal_sig()`` in the kernel's ``bprm_execve()``,
    and unlike kill(2), it does not care whether the new program was to inherit SIGSEGV as blocked or ignored.
    """
    program_counter = _PROGRAM_COUNTER_OFFSET.get(syscalls.MACHINE)
    if program_counter is None:
        raise OSError(errno.ENOSYS, f"the registers of {syscalls.MACHINE} are not known here")
    syscalls.call("ptrace", _PTRACE_SEIZE, thread, 0, _OPTION_TRACE_EXEC)
    # The interruption takes effect when the call returns to user space, so a failed execve stops there, not silently.
    with contextlib.suppress(ProcessLookupError):
        syscalls.call("ptrace", _PTRACE_INTERRUPT, thread, 0, 0)
    release()
    stopped = _wait_for_stop(thread, process)
    if stopped is None:
        return
    pid, status = stopped
    with contextlib.suppress(ProcessLookupError):  # killed while it was stopped
        if status >> 8 == _EVENT_EXEC:
            _jump_to_null(pid, program_counter)
            syscalls.call("ptrace", _PTRACE_DETACH, pid, 0, 0)
        else:
            pending = 0 if status >> 8 else status & 0x7F
            syscalls.call("ptrace", _PTRACE_DETACH, pid, 0, pending)


def _wait_for_stop(thread: int, process: int) -> tuple[int, int] | None:
    """Return which pid stopped and its status (the event above the signal); None if it died instead."""
    if thread == process:
        return _look(process, 0)
    while True:  # a thread that execs takes the pid of its process; its own id is then gone
        for pid in (thread, process):
            try:
                found = _look(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            if found is None or found[0]:
                return found
        if not Path(f"/proc/{process}").exists():
            return None
        time.sleep(_REST)


def _look(pid: int, options: int) -> tuple[int, int] | None:
    # WNOWAIT: the tracee may be a child that somebody else here waits for, who needs its exit status.
    info = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | _WALL | options)
    if info is None:
        return 0, 0
    if info.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        _let_parent_know(pid)
        return None
    # A stop is the tracer's alone. One at exec must be taken, or the kernel suspects that a tracee whose pid has
    # changed is mistaken for another (looks_like_a_spurious_pid()).
    os.waitpid(pid, _WALL)
    return pid, info.si_status


def _let_parent_know(pid: int) -> None:
    """Reap a dead tracee on behalf of its tracer: until then its parent is not told (kernel: ``exit_notify()``)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return
    parent = int(stat.rpartition(b")")[2].split()[1])
    if parent != os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, _WALL)


def _jump_to_null(pid: int, program_counter: int) -> None:
    registers = syscalls.writable(_REGISTERS_SIZE)
    vector = syscalls.writable(_IOVEC.size)
    vector.raw = _IOVEC.pack(syscalls.address(registers), _REGISTERS_SIZE)
    syscalls.call("ptrace", _PTRACE_GETREGSET, pid, _NT_PRSTATUS, vector)  # the kernel writes the size into the vector
    values = registers.raw
    registers.raw = values[:program_counter] + bytes(8) + values[program_counter + 8 :]
    syscalls.call("ptrace", _PTRACE_SETREGSET, pid, _NT_PRSTATUS, vector)
