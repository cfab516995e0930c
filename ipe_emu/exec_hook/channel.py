"""Messages, with descriptors, between the supervisor and its sandbox: one JSON object per packet of a socket pair."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

_LARGEST: Final = 1 << 18
_MOST_DESCRIPTORS: Final = 4


class Message(NamedTuple):
    """One message: its kind, its values, and descriptors that now belong to the receiver."""

    kind: str
    values: dict[str, Any]
    fds: list[int]


class Channel:
    """One end of the pair. Not inherited by programs that are executed."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        """Return two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """Return the descriptor, for poll(2)."""
        return self._socket.fileno()

    def send(self, kind: str, values: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        """Send a message and copies of ``fds``. BrokenPipeError if the other end is gone."""
        socket.send_fds(self._socket, [json.dumps([kind, values or {}]).encode()], list(fds))

    def receive(self) -> Message | None:
        """Wait for a message; None if the other end is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _LARGEST, _MOST_DESCRIPTORS)
        except ConnectionResetError:  # it was closed with a message of ours unread
            return None
        if not data:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        kind, values = json.loads(data)
        return Message(kind, values, fds)

    def ask(self, kind: str, values: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        """Send a message and wait for an answer, whatever it is. BrokenPipeError if the other end is gone."""
        self.send(kind, values, fds)
        if self.receive() is None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def report_failure(self, error: Exception) -> None:
        """Send ``failed``: why the sandbox cannot be made. Without effect if the other end is gone.

        What is no OSError is a defect of ours, and says where.
        """
        if isinstance(error, OSError):
            what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
        else:
            what = f"an error of ipe-emu's own: {error!r}, {_place_of(error)}"
        with contextlib.suppress(OSError):
            self.send("failed", {"why": what})

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def _place_of(error: Exception) -> str:
    trace: TracebackType | None = error.__traceback__
    place = "nowhere"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
