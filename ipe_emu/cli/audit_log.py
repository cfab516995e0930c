"""Where audit records go: a file, stderr, or somebody's socket; each line as auditd would store it."""

import functools
import itertools
import os
import queue
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Final, Protocol

from ipe_emu.audit import AuditRecord, format_line
from ipe_emu.cli.output import escape, say
from ipe_emu.errors import UserError

#: The option value that stands for stderr.
STDERR = "-"

#: How long a record may keep its system call waiting for a reader, in seconds; then they go on without it.
_PATIENCE: Final = 2.0
#: How many records are kept for a reader that has stopped (as the kernel's audit_backlog_limit).
_BACKLOG: Final = 64


class _Writer(Protocol):
    def __call__(self, line: bytes, /) -> object: ...


class AuditLog:
    """Writes every record at once, in the order of the calls; thread-safe.

    What is written to decides whether a call may wait: for a file it does not (see ``Courier`` for the rest). A line
    that cannot be written is not lost: it goes to stderr, with the reason, where somebody may still see it.
    """

    def __init__(self, write: _Writer) -> None:
        self._write = write
        self._serials = itertools.count(1)
        self._lock = threading.Lock()

    def __call__(self, record: AuditRecord) -> None:
        """Write ``record``; never raises, for its caller answers a system call."""
        with self._lock:
            line = format_line(record, time_ns=time.time_ns(), serial=next(self._serials))
            _write_or_say(self._write, line)


def _write_or_say(write: _Writer, line: bytes) -> None:
    try:
        write(line)
    except OSError as error:
        say(f"audit record not written ({error.strerror}): {escape(line.rstrip())}")


class Courier:
    """Writes lines, in order, to what may have a reader that stops: a pipe, a socket, a terminal.

    A line is out when the call returns, unless its reader keeps it waiting for too long. Nobody waits a second time for
    such a reader: lines are kept for it then, and lost where they are too many, as the kernel's are whose auditd has
    stopped. Both is said. Not thread-safe; the thread that writes is started with the first line, after every fork.
    """

    def __init__(self, write: _Writer, *, patience: float = _PATIENCE, backlog: int = _BACKLOG) -> None:
        self._write = write
        self._patience = patience
        self._backlog: queue.Queue[tuple[bytes, threading.Event]] = queue.Queue(backlog)
        self._stuck = threading.Event()
        self._stuck.set()
        self._pid = 0
        #: How many lines were lost.
        self.lost = 0

    def __call__(self, line: bytes, /) -> None:
        """Write ``line``; never raises, and never waits for long."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            threading.Thread(target=self._deliver, name="audit", daemon=True).start()
        written = threading.Event()
        try:
            self._backlog.put_nowait((line, written))
        except queue.Full:
            self.lost += 1
            return
        if self._stuck.is_set() and not written.wait(self._patience):
            self._stuck = written
            _say_aside("nobody reads the audit log; records are kept for a while, and then lost")

    def _deliver(self) -> None:
        said = 0
        while True:
            line, written = self._backlog.get()
            _write_or_say(self._write, line)
            written.set()
            if self.lost != said and self._backlog.empty():
                _say_aside(f"{self.lost - said} audit records were lost: nobody read the audit log")
                said = self.lost


def _say_aside(message: str) -> None:
    # stderr may be what nobody reads
    threading.Thread(target=say, args=(message,), daemon=True).start()


def open_audit_log(target: str | None) -> AuditLog:
    """Open ``--audit-log``: ``-`` is stderr, a listening unix socket gets a connection, anything else is a file.

    A file is appended to, and made with mode 0600 if there is none. Without the option records are counted and
    followed, and kept nowhere. Raises UserError if it cannot be opened.
    """
    if target is None:
        return AuditLog(len)
    if target == STDERR:
        return AuditLog(Courier(lambda line: os.write(sys.stderr.fileno(), line)))
    try:
        if _is_socket(target):
            return AuditLog(Courier(_connect(target).sendall))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        fd = os.open(target, flags, 0o600)
    except OSError as error:
        raise UserError(f"--audit-log {escape(target)}: {error.strerror}") from None
    write = functools.partial(os.write, fd)
    return AuditLog(write if stat.S_ISREG(os.fstat(fd).st_mode) else Courier(write))


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
