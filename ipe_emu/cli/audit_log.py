"""Where audit records go: a file, stderr, or somebody's socket; each line as auditd would store it."""

import itertools
import os
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from ipe_emu.audit import AuditRecord, format_line
from ipe_emu.cli.output import escape, say
from ipe_emu.errors import UserError

#: The option value that stands for stderr.
STDERR = "-"


class _Writer(Protocol):
    def __call__(self, line: bytes, /) -> object: ...


class AuditLog:
    """Writes every record at once, in the order of the calls; thread-safe.

    A line that cannot be written is not lost: it goes to stderr, with the reason, where somebody may still see it.
    """

    def __init__(self, write: _Writer) -> None:
        self._write = write
        self._serials = itertools.count(1)
        self._lock = threading.Lock()

    def __call__(self, record: AuditRecord) -> None:
        """Write ``record``; never raises, for its caller answers a system call."""
        with self._lock:
            line = format_line(record, time_ns=time.time_ns(), serial=next(self._serials))
            try:
                self._write(line)
            except OSError as error:
                say(f"audit record not written ({error.strerror}): {escape(line.rstrip())}")


def open_audit_log(target: str | None) -> AuditLog:
    """Open ``--audit-log``: ``-`` is stderr, a listening unix socket gets a connection, anything else is a file.

    A file is appended to, and made with mode 0600 if there is none. Without the option records are counted and
    followed, and kept nowhere. Raises UserError if it cannot be opened.
    """
    if target is None:
        return AuditLog(len)
    if target == STDERR:
        return AuditLog(lambda line: os.write(sys.stderr.fileno(), line))
    try:
        if _is_socket(target):
            return AuditLog(_connect(target).sendall)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        fd = os.open(target, flags, 0o600)
    except OSError as error:
        raise UserError(f"--audit-log {escape(target)}: {error.strerror}") from None
    return AuditLog(lambda line: os.write(fd, line))


def audit_file(target: str | None) -> Path | None:
    """The file that records go to, if that is where they go."""
    return None if target in (None, STDERR) or _is_socket(target) else Path(target)


def _is_socket(target: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(target).st_mode)  # noqa: PTH116 (Path.is_socket hides EACCES)
    except FileNotFoundError:
        return False


def _connect(target: str) -> socket.socket:
    """Connect to a stream socket, or to a datagram one: one record is one datagram then."""
    last: OSError | None = None
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        connection = socket.socket(socket.AF_UNIX, kind)
        try:
            connection.connect(target)
        except OSError as error:
            connection.close()
            last = error
        else:
            return connection
    assert last is not None  # noqa: S101 (for the type checker: the loop ran)
    raise last
