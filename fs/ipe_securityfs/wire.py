"""What travels between a mounted emulator and its commands: one JSON object in one line, and how values look in it.

Bytes travel as text in latin-1, so that every byte keeps its value; digests in hex.
"""

import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

from ipe_emu.errors import IpeEmuError
from ipe_emu.event import File, Subject
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.integrity.sources import Place
from ipe_emu.linux.mountinfo import Location
from ipe_emu.lsm import Decision
from ipe_emu.policy.evaluate import Match, Verdict
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.render import statement
from ipe_emu.policy.rule import Action, Operation, Rule

Message = dict[str, Any]

#: Longer lines are no message of ours.
MAX_MESSAGE: Final = 1 << 20


class ProtocolError(IpeEmuError):
    """The other side of the control socket said something that is no message."""


class Lines:
    """A connected stream socket that carries messages. Owned by one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; OSError if the other side is gone."""
        self.socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def receive(self) -> Message | None:
        """Return the next message, None at the end; ProtocolError for anything else, OSError as the socket gives it."""
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_MESSAGE:
                raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
            data = self.socket.recv(1 << 16)
            if not data:
                if self._rest:
                    raise ProtocolError("a message ends in the middle")
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise ProtocolError("a message is not JSON") from None
        if not isinstance(message, dict):
            raise ProtocolError("a message is not an object")
        return message


def text_of(data: bytes) -> str:
    """Return bytes as text that ``bytes_of`` gives back."""
    return data.decode("latin-1")


def bytes_of(text: object) -> bytes:
    """Return what ``text_of`` was given; ProtocolError for anything else."""
    if not isinstance(text, str):
        raise ProtocolError("bytes are missing")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise ProtocolError("bytes are not latin-1") from None


def integer(message: Mapping[str, Any], key: str) -> int:
    """Return an integer of a message; ProtocolError if there is none."""
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"{key} must be an integer")
    return value


def _digest_out(digest: Digest | None) -> list[str] | None:
    return None if digest is None else [digest.algorithm, digest.value.hex()]


def _digest_in(value: object) -> Digest | None:
    match value:
        case None:
            return None
        case [str(algorithm), str(text)]:
            try:
                return Digest(algorithm, bytes.fromhex(text))
            except ValueError:
                raise ProtocolError("a digest is not hex") from None
    raise ProtocolError("a digest must be an algorithm and its value")


def facts_out(facts: Facts) -> Message:
    """Return facts as a message holds them."""
    return {
        "boot_verified": facts.boot_verified,
        "dmverity_roothash": _digest_out(facts.dmverity_roothash),
        "dmverity_signature": facts.dmverity_signature,
        "fsverity_digest": _digest_out(facts.fsverity_digest),
        "fsverity_signature": facts.fsverity_signature,
        "dmverity_in_doubt": facts.dmverity_in_doubt,
        "fsverity_in_doubt": facts.fsverity_in_doubt,
    }


def facts_in(message: object) -> Facts:
    """Return the facts of a message; what is not exactly true is false."""
    if not isinstance(message, dict):
        raise ProtocolError("facts must be an object")
    return Facts(
        boot_verified=message.get("boot_verified") is True,
        dmverity_roothash=_digest_in(message.get("dmverity_roothash")),
        dmverity_signature=message.get("dmverity_signature") is True,
        fsverity_digest=_digest_in(message.get("fsverity_digest")),
        fsverity_signature=message.get("fsverity_signature") is True,
        dmverity_in_doubt=_doubt_in(message.get("dmverity_in_doubt")),
        fsverity_in_doubt=_doubt_in(message.get("fsverity_in_doubt")),
    )


def _doubt_in(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ProtocolError("a doubt is no text")


def file_out(file: File | None) -> Message | None:
    """Return a file as a message holds it."""
    if file is None:
        return None
    dev = text_of(file.dev.encode("utf-8", "surrogateescape"))
    return {"path": text_of(file.path), "dev": dev, "ino": file.ino, "facts": facts_out(file.facts)}


def file_in(message: object) -> File | None:
    """Return the file of a message."""
    if message is None:
        return None
    if not isinstance(message, dict):
        raise ProtocolError("a file must be an object")
    dev = bytes_of(message.get("dev")).decode("utf-8", "surrogateescape")
    return File(bytes_of(message.get("path")), dev, integer(message, "ino"), facts_in(message.get("facts")))


def location_out(place: Place | None) -> dict[str, str] | None:
    """Return where a file lies, for the other side."""
    if place is None:
        return None
    return {
        "device": place.device,
        "path": place.path.decode("latin-1"),
        "mount_root": place.mount_root.decode("latin-1"),
        "kind": place.kind,
    }


def location_in(value: object) -> Location | None:
    """Take where a file lies from a message; ProtocolError if it is not that."""
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("device"), str):
        raise ProtocolError("no place of a file")
    path, mount_root = bytes_of(value.get("path")), bytes_of(value.get("mount_root"))
    return Location(value["device"], path, mount_root, str(value.get("kind", "")))


def stat_out(status: os.stat_result) -> list[int]:
    """Return what facts depend on of a stat(2)."""
    return [status.st_mode, status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def stat_in(value: object) -> os.stat_result:
    """Return the stat of a message; the fields that it does not carry are 0."""
    match value:
        case [int(mode), int(ino), int(dev), int(size), int(mtime_ns), int(ctime_ns)]:
            seconds = (0, mtime_ns // 10**9, ctime_ns // 10**9)
            return os.stat_result((mode, ino, dev, 0, 0, 0, size, *seconds, *seconds, 0, mtime_ns, ctime_ns))
    raise ProtocolError("a stat must be six integers")


def subject_out(subject: Subject) -> Message:
    """Return who asks, as a message holds it."""
    return {"pid": subject.pid, "comm": text_of(subject.comm)}


def subject_in(message: Mapping[str, Any]) -> Subject:
    """Return who asks."""
    return Subject(integer(message, "pid"), bytes_of(message.get("comm")))


def decision_out(decision: Decision) -> Message:
    """Return a decision as a message holds it."""
    verdict = decision.verdict
    if verdict is None:
        return {"errno": decision.errno, "verdict": None}
    return {
        "errno": decision.errno,
        "verdict": {
            "action": verdict.action.value,
            "match": verdict.match.value,
            "operation": verdict.operation.value,
            "rule": statement(verdict.rule) if verdict.rule else None,
        },
    }


def decision_in(message: Mapping[str, Any]) -> Decision:
    """Return the decision of a message; ProtocolError if it is none."""
    number = integer(message, "errno")
    verdict = message.get("verdict")
    if verdict is None:
        return Decision(number, None)
    if not isinstance(verdict, dict):
        raise ProtocolError("a verdict must be an object")
    try:
        return Decision(
            number,
            Verdict(
                Action(verdict.get("action")),
                Match(verdict.get("match")),
                Operation(verdict.get("operation")),
                _rule_in(verdict.get("rule")),
            ),
        )
    except ValueError as error:
        raise ProtocolError(f"a verdict is not understood: {error}") from None


def _rule_in(text: object) -> Rule | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ProtocolError("a rule must be text")
    policy = parse_policy(b"policy_name=_ policy_version=0.0.0\nDEFAULT action=DENY\n" + text.encode("latin-1") + b"\n")
    return policy.rules[0]
