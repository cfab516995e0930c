"""The audit records of each step: from the kernel itself over netlink, or from the emulator's log."""

import re
import socket
import struct
from pathlib import Path
from typing import Protocol

#: type, and the text after "audit(...): ".
Record = tuple[int, str]

MAC_STATUS, IPE_ACCESS, IPE_CONFIG_CHANGE, IPE_POLICY_LOAD = 1404, 1420, 1421, 1422
NAMES = {
    "MAC_STATUS": MAC_STATUS,
    "IPE_ACCESS": IPE_ACCESS,
    "IPE_CONFIG_CHANGE": IPE_CONFIG_CHANGE,
    "IPE_POLICY_LOAD": IPE_POLICY_LOAD,
}
#: What depends on the machine, and on when it was: everything else must be equal.
_MACHINE_S_OWN = re.compile(r'\b(pid|ino|ses)=\d+|\b(dev)=("[^"]*"|\w+)')


def normal(text: str) -> str:
    return _MACHINE_S_OWN.sub(lambda found: found[0].partition("=")[0] + "=*", text).strip()


class AuditSource(Protocol):
    """Where the records of steps come from."""

    def step_done(self) -> None:
        """What was recorded since the last call belongs to one step."""

    def of_steps(self) -> list[list[Record]]:
        """The records of every step so far, and forget them."""


class LogAudit:
    """The emulator's log: a record is in it before the system call returns."""

    def __init__(self, log: Path) -> None:
        self._stream = log.open("rb")
        self._stream.read()
        self._steps: list[list[Record]] = []

    def step_done(self) -> None:
        # Cut at line feeds alone: a policy's name may hold what splitlines() takes for the end of a line.
        lines = self._stream.read().decode("utf-8", "surrogateescape").split("\n")[:-1]
        self._steps.append([_of_line(line) for line in lines])

    def of_steps(self) -> list[list[Record]]:
        steps, self._steps = self._steps, []
        return steps


def _of_line(line: str) -> Record:
    name, _, text = line.removeprefix("type=").partition(" ")
    return NAMES[name], normal(text.partition("): ")[2])


class KernelAudit:
    """The kernel's records, received as its audit daemon.

    kauditd delivers them when it gets to it. So each step is followed by a message of our own, which takes its place
    in the same queue, and nobody waits until there are many.
    """

    _NETLINK_AUDIT, _AUDIT_SET, _AUDIT_USER_AVC = 9, 1001, 1107
    _STATUS_ENABLED, _STATUS_FAILURE, _STATUS_PID, _STATUS_RATE, _STATUS_BACKLOG = 1, 2, 4, 8, 16
    _SO_RCVBUFFORCE = 33
    _DRAIN_AFTER = 25  # steps
    _HEADER = struct.Struct("=IHHII")

    def __init__(self, pid: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, self._NETLINK_AUDIT)
        self._socket.setsockopt(socket.SOL_SOCKET, self._SO_RCVBUFFORCE, 64 << 20)
        self._socket.settimeout(20)
        mask = self._STATUS_FAILURE | self._STATUS_PID | self._STATUS_RATE | self._STATUS_BACKLOG
        # mask, enabled, failure (silent), pid, rate limit (none), backlog limit (none), lost, backlog
        self._send(self._AUDIT_SET, struct.pack("=8I", mask, 0, 0, pid, 0, 0, 0, 0))
        self._marks = 0
        self._seen = 0
        self._current: list[Record] = []
        self._steps: list[list[Record]] = []

    def _send(self, kind: int, payload: bytes) -> None:
        self._socket.sendto(self._HEADER.pack(16 + len(payload), kind, 1, 0, 0) + payload, (0, 0))

    def step_done(self) -> None:
        self._marks += 1
        self._send(self._AUDIT_USER_AVC, b"step %d\0" % self._marks)
        if self._marks - self._seen >= self._DRAIN_AFTER:
            self._drain()

    def _drain(self) -> None:
        while self._seen < self._marks:
            message = self._socket.recv(1 << 16)
            kind = self._HEADER.unpack_from(message)[1]
            text = message[16:].rstrip(b"\0").decode("utf-8", "surrogateescape").partition("): ")[2]
            if kind == self._AUDIT_USER_AVC and "msg='step " in text:
                self._seen += 1
                self._steps.append(self._current)
                self._current = []
            elif kind in NAMES.values():
                self._current.append((kind, normal(text)))

    def of_steps(self) -> list[list[Record]]:
        self._drain()
        steps, self._steps = self._steps, []
        return steps
