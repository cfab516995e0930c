"""seccomp(2): a filter that hands chosen system calls to a supervisor, and the supervisor's end of it.

Two halves: `Rule` and `assemble` make the classic BPF program that a child installs in itself (`install`); `Listener`
receives the calls that the program hands over and answers them (seccomp_unotify(2)).
"""

import errno
import fcntl
import os
import re
import select
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from ipe_emu.linux import syscalls


class Action(IntEnum):
    """What becomes of a system call (the SECCOMP_RET_ values)."""

    NOTIFY = 0x7FC00000
    ENOSYS = 0x00050000 | errno.ENOSYS


_ALLOW: Final = 0x7FFF0000


@dataclass(frozen=True)
class AnyBit:
    """Holds if the low half of argument number ``argument`` has a bit of ``mask`` and is not ``unless``."""

    argument: int
    mask: int
    unless: int | None = None


@dataclass(frozen=True)
class Masked:
    """Holds if the low half of argument number ``argument``, cut to ``mask``, is ``value``."""

    argument: int
    mask: int
    value: int


Condition = AnyBit | Masked


@dataclass(frozen=True)
class Rule:
    """One system call, by name, and what becomes of it where ``when`` holds; elsewhere it is let through.

    Of several rules for one call the first that holds counts.
    """

    syscall: str
    action: Action
    when: Condition | None = None


# AUDIT_ARCH_ values (include/uapi/linux/audit.h): the only architecture whose calls are let through.
_AUDIT_ARCH: Final[Mapping[str, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# x32 calls carry this bit in their number, under the architecture x86_64.
_X32_SYSCALL_BIT: Final = 0x40000000
# What a tracer writes to have a call skipped (ptrace(2)); it is no x32 call, and must keep the tracer's return value.
_NO_SYSCALL: Final = 0xFFFFFFFF

# Classic BPF (include/uapi/linux/bpf_common.h): load a word of seccomp_data, jump on a constant, mask, return.
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_OR_EQUAL: Final = 0x35
_JUMP_ANY_BIT: Final = 0x45
_AND: Final = 0x54
_RETURN: Final = 0x06

# Offsets in struct seccomp_data; the low half of an argument comes first on the little-endian machines above.
_OFFSET_NUMBER: Final = 0
_OFFSET_ARCH: Final = 4
_OFFSET_ARGUMENTS: Final = 16

_INSTRUCTION: Final = struct.Struct("=HBBI")


def assemble(rules: Iterable[Rule], machine: str, numbers: Mapping[str, int]) -> bytes:
    """Return the BPF program of ``rules`` for one architecture, as an array of ``struct sock_filter``.

    Calls of every other architecture, x32 among them, answer ENOSYS: they would pass below the table of numbers.
    A rule for a call that this architecture does not have is left out. Raises ``NotImplementedError`` for a machine
    without a table, and ``ValueError`` for a name that no table has: a call that is misspelt would never be looked at.
    """
    if machine not in _AUDIT_ARCH:
        raise NotImplementedError(f"no seccomp filter is known here for {machine}")
    program = [
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, Action.ENOSYS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [
            (_JUMP_EQUAL, 2, 0, _NO_SYSCALL),
            (_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_SYSCALL_BIT),
            (_RETURN, 0, 0, Action.ENOSYS),
        ]
    by_call: dict[str, list[Rule]] = {}
    for rule in rules:
        by_call.setdefault(rule.syscall, []).append(rule)
    for name, of_call in by_call.items():
        if name not in syscalls.KNOWN:
            raise ValueError(f"no system call {name} is known here")
        if name in numbers:
            body = [instruction for rule in of_call for instruction in _body(rule)]
            if not any(rule.when is None for rule in of_call):
                body.append((_RETURN, 0, 0, _ALLOW))
            program += [(_JUMP_EQUAL, 0, len(body), numbers[name]), *body]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(code, yes, no, value) for code, yes, no, value in program)


def _body(rule: Rule) -> list[tuple[int, int, int, int]]:
    """Return what answers where the rule holds, and goes on behind its last instruction where not."""
    answer = (_RETURN, 0, 0, int(rule.action))
    if rule.when is None:
        return [answer]
    load = (_LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * rule.when.argument)
    if isinstance(rule.when, Masked):
        return [load, (_AND, 0, 0, rule.when.mask), (_JUMP_EQUAL, 0, 1, rule.when.value), answer]
    unless = [] if rule.when.unless is None else [(_JUMP_EQUAL, 2, 0, rule.when.unless)]
    return [load, *unless, (_JUMP_ANY_BIT, 0, 1, rule.when.mask), answer]


_SET_MODE_FILTER: Final = 1
_FLAG_NEW_LISTENER: Final = 1 << 3
# Once a call was received, only a fatal signal interrupts it: any other would make the kernel repeat the call, and so
# the notification, and so the audit records.
_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5


def install(rules: Iterable[Rule]) -> int:
    """Put the calling thread under a filter of ``rules``; return the listener's descriptor (close-on-exec).

    Needs CAP_SYS_ADMIN in the thread's user namespace, or no_new_privs. OSError EBUSY if a listener is there already.
    """
    program = assemble(rules, syscalls.MACHINE, syscalls.NUMBERS)
    instructions = syscalls.writable(len(program))
    instructions.raw = program
    header = struct.pack("@HP", len(program) // _INSTRUCTION.size, syscalls.address(instructions))
    return syscalls.call("seccomp", _SET_MODE_FILTER, _FLAG_NEW_LISTENER | _FLAG_WAIT_KILLABLE_RECV, header)


class Notification(NamedTuple):
    """One system call that waits for an answer (``struct seccomp_notif``).

    ``pid`` is the calling *thread*, in the receiver's pid namespace. ``id`` is what answers refer to.
    """

    id: int
    pid: int
    number: int
    args: tuple[int, int, int, int, int, int]

    @property
    def name(self) -> str:
        """The system call's name, or its number in words."""
        return syscalls.NAMES.get(self.number, f"system call {self.number}")


_IOCTL_RECEIVE: Final = 0xC0502100
_IOCTL_SEND: Final = 0xC0182101
_IOCTL_ID_VALID: Final = 0x40082102
_IOCTL_ADDFD: Final = 0x40182103
_FLAG_CONTINUE: Final = 1
# The call returns the number of the descriptor that was added.
_ADDFD_FLAG_SEND: Final = 1 << 1

_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
#: struct seccomp_notif_addfd: id, flags, our descriptor, theirs (if it is chosen here), O_CLOEXEC or nothing.
_ADDFD: Final = struct.Struct("=QIIII")
_U64: Final = struct.Struct("=Q")


def receiving_ends(release: str) -> bool:
    """Whether on a kernel of this release (uname(2)) SECCOMP_IOCTL_NOTIF_RECV returns when no process is left.

    Older ones leave whoever waits in it there, so that it must be asked first whether there is anything to receive.
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _FIRST_THAT_ENDS


_FIRST_THAT_ENDS: Final = (6, 12)
_RECEIVING_ENDS: Final = receiving_ends(os.uname().release)


class Listener:
    """The supervisor's end of a filter. One thread receives; it owns ``fd``.

    SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP is not set: it makes the round trip itself shorter, but draws all that a caller
    does to the processor of the supervisor, and whole trees ran slower for it, on busy machines too.

    A caller that dies while it waits takes its notification with it: such answers are dropped silently.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(_NOTIFICATION.size)
        self._empty = bytes(_NOTIFICATION.size)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def receive(self, timeout_ms: int | None = None) -> Notification | None:
        """Wait for the next call. None when no process is left under the filter.

        Raises ``TimeoutError`` if ``timeout_ms`` pass without one.
        """
        ended = False
        while True:
            if timeout_ms is not None or ended or not _RECEIVING_ENDS:
                events = self._poll.poll(timeout_ms)
                if not events:
                    raise TimeoutError("no notification")
                if not events[0][1] & select.POLLIN:
                    return None
            self._buffer[:] = self._empty  # the kernel insists on zeroes
            try:
                fcntl.ioctl(self.fd, _IOCTL_RECEIVE, self._buffer, True)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                ended = error.errno == errno.ENOENT  # all have, or it was the caller alone, killed in between
                continue
            fields = _NOTIFICATION.unpack(self._buffer)
            return Notification(fields[0], fields[1], fields[3], fields[6:])

    def valid(self, notification: Notification) -> bool:
        """Whether the caller still waits: only then does what was read of its pid belong to it."""
        try:
            fcntl.ioctl(self.fd, _IOCTL_ID_VALID, _U64.pack(notification.id))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def continue_(self, notification: Notification) -> None:
        """Let the kernel carry out the call, with whatever its arguments point to by then."""
        self._send(notification, 0, 0, _FLAG_CONTINUE)

    def fail(self, notification: Notification, number: int) -> None:
        """Have the call fail with errno ``number``."""
        self._send(notification, 0, -number, 0)

    def reply(self, notification: Notification, value: int) -> None:
        """Have the call return ``value`` without being carried out."""
        self._send(notification, value, 0, 0)

    def install(self, notification: Notification, fd: int, *, close_on_exec: bool) -> None:
        """Have the call return a new descriptor of the caller's that is open on what ``fd`` is open on.

        OSError EMFILE if the caller may have no more.
        """
        flags = os.O_CLOEXEC if close_on_exec else 0
        try:
            fcntl.ioctl(self.fd, _IOCTL_ADDFD, _ADDFD.pack(notification.id, _ADDFD_FLAG_SEND, fd, 0, flags))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise

    def _send(self, notification: Notification, value: int, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(self.fd, _IOCTL_SEND, _RESPONSE.pack(notification.id, value, error, flags))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        """Close the descriptor: calls that wait, and all that follow, then fail with ENOSYS."""
        os.close(self.fd)
