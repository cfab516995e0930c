"""The answers of a mounted emulator on its control socket."""

import contextlib
import errno
import itertools
import os
import queue
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from attrs import define, evolve

from ipe_emu.audit import AuditRecord, RecordType, format_line
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import procfs
from ipe_emu.lsm import Ipe, LoadedPolicy
from ipe_emu.policy.rule import Operation
from ipe_securityfs.clients import describe
from ipe_securityfs.control import Peer
from ipe_securityfs.wire import (
    Lines,
    Message,
    ProtocolError,
    bytes_of,
    decision_out,
    facts_out,
    file_in,
    file_out,
    integer,
    location_in,
    stat_in,
    subject_in,
    text_of,
)

#: A follower that is further behind than this many records is cut off: it would get a log with a hole.
_FOLLOWER_BACKLOG: Final = 10_000
#: How often a follower that gets no records is looked after.
_SECONDS_BETWEEN_LOOKS: Final = 2.0


class AuditTap:
    """Sees every record of an emulator on its way to where its records go: counts it, and gives it to followers."""

    def __init__(self, ipe: Ipe) -> None:
        self._emit = ipe.emit
        self._followers: list[queue.Queue[bytes | None]] = []
        self._serials = itertools.count(1)
        self._lock = threading.Lock()
        self._in_this_thread = threading.local()
        self.counts: Counter[RecordType] = Counter()
        self.denials = 0
        ipe.emit = self._record

    def _record(self, record: AuditRecord) -> None:
        self._emit(record)
        with self._lock:
            self.counts[record.type] += 1
            line = format_line(record, time_ns=time.time_ns(), serial=next(self._serials))
            for follower in tuple(self._followers):
                try:
                    follower.put_nowait(line)
                except queue.Full:
                    self._followers.remove(follower)
                    follower.get_nowait()
                    follower.put_nowait(None)
        collected: list[AuditRecord] | None = getattr(self._in_this_thread, "records", None)
        if collected is not None:
            collected.append(record)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[list[AuditRecord]]:
        """Give the records that this thread causes within the block."""
        self._in_this_thread.records = records = list[AuditRecord]()
        try:
            yield records
        finally:
            self._in_this_thread.records = None

    @contextlib.contextmanager
    def following(self) -> Iterator["queue.Queue[bytes | None]"]:
        """Give a queue of all lines from now on; None in it means that its reader was too slow."""
        follower: queue.Queue[bytes | None] = queue.Queue(_FOLLOWER_BACKLOG)
        with self._lock:
            self._followers.append(follower)
        try:
            yield follower
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._followers.remove(follower)


@define(eq=False)
class Service:
    """Answers requests; thread-safe. ``about`` is what only the mount knows and ``status`` shows as it is.

    ``stop`` ends the session. ``adopt`` has the capabilities of one more user namespace count and returns what undoes
    it: that of a sandbox which was attached by a process that is allowed to speak here.
    """

    ipe: Ipe
    facts: FactsSource
    tap: AuditTap
    about: dict[str, Any]
    stop: Callable[[], None]
    adopt: Callable[[int], Callable[[], None]]

    def handle(self, request: Message, peer: Peer, lines: Lines) -> Message | None:
        """Answer one request (``control.Handler``)."""
        match request.get("request"):
            case "status":
                return self._status()
            case "decide":
                return self._decide(request, peer)
            case "process_event":
                return self._process_event(request)
            case "facts":
                return self._facts(request)
            case "follow":
                self._follow(lines)
                return None
            case "attach":
                return self._attach(request, lines)
            case "stop":
                lines.send({})
                self.stop()
                return None
            case other:
                return {"error": f"unknown request: {other!r}"}

    # -- status -----------------------------------------------------------------------------------------------------

    def _status(self) -> Message:
        ipe = self.ipe
        active = ipe.active
        return {
            **self.about,
            "profile": ipe.profile.name,
            "enforce": ipe.enforce,
            "success_audit": ipe.success_audit,
            "active": active.name if active else None,
            "policies": [row for loaded in ipe.policies if (row := _row(loaded, active)) is not None],
            "records": {kind.name: self.tap.counts[kind] for kind in RecordType},
            "upstream_refusals": [
                {"what": refusal.what, "answer": refusal.answer, "replaced_signed": refusal.replaced_signed}
                for refusal in tuple(ipe.upstream_refusals)
            ],
        }

    # -- events -----------------------------------------------------------------------------------------------------

    def _decide(self, request: Message, peer: Peer) -> Message:
        try:
            operation, hook = _operation_and_hook(request)
            subject = Subject(peer.pid, procfs.comm(peer.pid))
            path = request.get("path")
            file = None if path is None else self._file_at(bytes_of(path))
        except OSError as error:  # KernelError is one
            return {"error": f"{request.get('path')!r}: {error.strerror}"}
        except NotJudgedError as error:
            return {"error": f"{request.get('path')!r}: {error}", "not_judged": True}
        with self.tap.collecting() as records:
            try:
                decision = self.ipe.process_event(operation, hook, subject, file)
            except NotJudgedError as error:
                return {"error": f"{request.get('path')!r}: {error}", "not_judged": True}
        return decision_out(decision) | {
            "hook": hook.value,
            "file": file_out(file),
            "records": [{"type": record.type.name, "text": text_of(record.text)} for record in records],
        }

    def _file_at(self, path: bytes) -> File:
        if not path.startswith(b"/") or b"\0" in path:
            raise ProtocolError("a path must be absolute")
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise KernelError(errno.EINVAL, "not a regular file", "kernel_read_file")
            return describe(os.getpid(), fd, self.facts)
        finally:
            os.close(fd)

    def _process_event(self, request: Message) -> Message:
        operation, hook = _operation_and_hook(request)
        try:
            return decision_out(
                self.ipe.process_event(operation, hook, subject_in(request), file_in(request.get("file")))
            )
        except NotJudgedError as error:
            return {"error": str(error), "not_judged": True}

    def _facts(self, request: Message) -> Message:
        place, st = location_in(request.get("place")), stat_in(request.get("stat"))
        try:
            facts = self.facts.facts_of(place, st, _no_content)
        except NotJudgedError as error:
            return {"error": str(error), "not_judged": True}
        # The asker, who has the file, asks this machine's kernel himself: what is in doubt here need not be there.
        return {"facts": facts_out(evolve(facts, dmverity_in_doubt=None, fsverity_in_doubt=None))}

    # -- connections that last ----------------------------------------------------------------------------------------

    def _follow(self, lines: Lines) -> None:
        with self.tap.following() as follower:
            lines.send({})
            while True:
                try:
                    line = follower.get(timeout=_SECONDS_BETWEEN_LOOKS)
                except queue.Empty:
                    if _has_left(lines.socket):
                        return
                    continue
                if line is None:
                    break
                lines.send({"line": text_of(line)})
            lines.send({"error": "records came faster than they were read; some are missing from here on"})

    def _attach(self, request: Message, lines: Lines) -> Message | None:
        undo = self.adopt(integer(request, "user_namespace"))
        try:
            lines.send({})
            while lines.receive() is not None:
                pass
        finally:
            undo()
        return None


def _row(loaded: LoadedPolicy, active: LoadedPolicy | None) -> Message | None:
    try:
        policy = loaded.policy
        return {
            "name": policy.name,
            "version": str(policy.version),
            "rules": len(policy.rules),
            "active": loaded is active,
            "signed": loaded.signed,
        }
    except KernelError:  # deleted meanwhile
        return None


def _operation_and_hook(request: Message) -> tuple[Operation, Hook]:
    try:
        operation = Operation(request.get("operation"))
        hook = request.get("hook")
        if hook is None:
            return operation, Hook.BPRM_CHECK if operation is Operation.EXECUTE else Hook.KERNEL_READ
        return operation, Hook(hook)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _no_content() -> NoReturn:
    # The file lies in the asker's mount namespace; a sealed file that changed has lost its digest all the same.
    raise FileNotFoundError(errno.ENOENT, "not to be opened from here")


def _has_left(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
