"""Talking to a mounted emulator. Needs neither trio nor pyfuse3."""

import os
import select
import socket
from collections.abc import Iterator
from typing import Self

from attrs import define, field

from ipe_emu.errors import IpeEmuError, NotJudgedError, UserError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Facts
from ipe_emu.integrity.sources import OpenFile, Place
from ipe_emu.linux import syscalls
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import PROFILES, Profile
from ipe_securityfs.control import (
    NotAllowedError,
    Peer,
    check_peer,
    is_locked,
    key_of,
    peer_of,
    runtime_directories,
)
from ipe_securityfs.unmount import detach_dead, wait_until_gone
from ipe_securityfs.wire import (
    Lines,
    Message,
    ProtocolError,
    bytes_of,
    decision_in,
    facts_in,
    file_out,
    location_out,
    stat_out,
    subject_out,
)

#: How long a healthy emulator may take for anything but following.
SECONDS_TO_ANSWER = 20.0


class RequestError(IpeEmuError):
    """The emulator understood a request and could not do it; the message is its own."""


@define(eq=False)
class Connection:
    """One connection; a context manager. Owned by one thread at a time."""

    mountpoint: str
    lines: Lines
    server: Peer

    @classmethod
    def open(cls, mountpoint: str | os.PathLike[str]) -> Self:
        """Connect to the emulator mounted on a directory. UserError if none is, or if it is not this user's."""
        real = os.path.realpath(mountpoint)
        for directory in runtime_directories():
            path = directory / f"{key_of(real)}.sock"
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(SECONDS_TO_ANSWER)
            try:
                connection.connect(str(path))
                server = peer_of(connection)
                check_peer(server)
            except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError, PermissionError):
                connection.close()
            except NotAllowedError as error:
                connection.close()
                raise UserError(f"{real}: the emulator there is not to be trusted: {error}") from None
            except OSError as error:
                connection.close()
                raise UserError(f"{real}: the emulator there does not answer: {error.strerror}") from None
            else:
                return cls(real, Lines(connection), server)
        raise UserError(f"{real}: no emulator is mounted there by this user; `ipe-emu mount {real}` mounts one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.lines.socket.close()

    def request(self, name: str, **fields: object) -> Message:
        """Ask and return the answer.

        RequestError or NotJudgedError with the emulator's words, UserError if it does not answer.
        """
        try:
            self.lines.send({"request": name, **fields})
            answer = self.lines.receive()
        except (OSError, ProtocolError) as error:
            raise UserError(f"{self.mountpoint}: the emulator does not answer: {error}") from None
        if answer is None:
            raise UserError(f"{self.mountpoint}: the emulator ended")
        if "error" in answer:
            failure = NotJudgedError if answer.get("not_judged") else RequestError
            raise failure(str(answer["error"]))
        return answer

    def follow(self) -> Iterator[bytes]:
        """Yield audit lines, newline included, as auditd would store them, from now until the emulator ends.

        RequestError if they came faster than they were taken.
        """
        self.request("follow")
        self.lines.socket.settimeout(None)
        while True:
            try:
                message = self.lines.receive()
            except OSError:
                return
            if message is None:
                return
            if "error" in message:
                raise RequestError(str(message["error"]))
            yield bytes_of(message.get("line"))


@define(eq=False)
class RemoteIpe:
    """The judge of ``run --attach``: a mounted emulator. Also knows its facts (``FactsSource``).

    The connection must be made before this process enters another user or pid namespace: from there the emulator
    would not let it speak. One thread at a time.
    """

    connection: Connection
    profile: Profile = field(init=False)
    _attached: Connection | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        name = self.connection.request("status").get("profile")
        if not isinstance(name, str) or name not in PROFILES:
            raise UserError(f"{self.connection.mountpoint}: the emulator there is of another version ({name!r})")
        self.profile = PROFILES[name]

    def passes(self, operation: Operation, facts: Facts) -> bool:  # noqa: ARG002 - a Judge's
        """Say that it cannot be told before: to ask once is quicker than to ask twice."""
        return False

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        """Have one event decided and audited there; NotJudgedError if no answer comes."""
        try:
            return decision_in(
                self.connection.request(
                    "process_event",
                    operation=operation.value,
                    hook=hook.value,
                    file=file_out(file),
                    **subject_out(subject),
                )
            )
        except (UserError, RequestError, ProtocolError) as error:
            raise NotJudgedError(str(error)) from None

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:  # noqa: ARG002 - the protocol's signature
        """Return what the mounted emulator was told of a file; NotJudgedError if no answer comes."""
        try:
            answer = self.connection.request("facts", place=location_out(place), stat=stat_out(st))
            return facts_in(answer.get("facts"))
        except (UserError, RequestError, ProtocolError) as error:
            raise NotJudgedError(str(error)) from None


def attach(connection: Connection, user_namespace: int) -> None:
    """Have capabilities of a sandbox's user namespace count on the mount for as long as ``connection`` stays open.

    ``user_namespace`` is the inode number of /proc/PID/ns/user. The connection is of no other use after that.
    """
    connection.request("attach", user_namespace=user_namespace)


def unmount(mountpoint: str | os.PathLike[str]) -> str:
    """End the emulator mounted on a directory and wait until it is gone; returns what was done, in words.

    A dead mount of ours is taken away. UserError if there is neither.
    """
    real = os.path.realpath(mountpoint)
    try:
        connection = Connection.open(real)
    except UserError:
        if detach_dead(real):
            return f"{real}: a mount whose emulator was killed is gone"
        if _is_starting_or_stuck(real):
            raise UserError(f"{real}: its emulator lives and does not answer; try again, or kill it") from None
        raise
    with connection:
        pidfd = syscalls.call("pidfd_open", connection.server.pid, 0)
        try:
            connection.request("stop")
            if not select.select([pidfd], [], [], SECONDS_TO_ANSWER)[0]:
                raise UserError(f"{real}: the emulator (process {connection.server.pid}) does not end")
        finally:
            os.close(pidfd)
    wait_until_gone(real)
    return f"{real}: unmounted"


def _is_starting_or_stuck(real: str) -> bool:
    return any(is_locked(directory / f"{key_of(real)}.lock") for directory in runtime_directories())
