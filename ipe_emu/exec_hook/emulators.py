"""What judges a run: an emulator of its own, or one that is mounted already (``run --attach``)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from attrs import define, field

from ipe_emu.exec_hook.hook import Judge
from ipe_emu.exec_hook.report import Report
from ipe_emu.exec_hook.sandbox import Sandbox, Surroundings
from ipe_emu.exec_hook.supervisor import SecurityFsServer
from ipe_emu.integrity.declared import Declared, is_volume
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.lsm import Ipe, UpstreamRefusal

if TYPE_CHECKING:
    from ipe_securityfs.client import Connection, RemoteIpe


class Emulator(Protocol):
    """The calls come in the order of these methods; ``end`` comes in any case, once the sandbox is dead."""

    @property
    def securityfs(self) -> Path | None:
        """Where a securityfs is mounted that the tree is to see; None if it gets one of its own."""

    @property
    def volumes(self) -> Sequence[Path]:
        """The directories that become read-only mounts of their own, for dm-verity facts are declared of them."""

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Do what can be done while the sandbox is being made."""

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Serve the finished sandbox; return who decides, and who knows the facts of files."""

    def end(self) -> None:
        """Stop serving."""

    @property
    def refusals(self) -> Sequence[UpstreamRefusal]:
        """What a released kernel would have refused."""


@define(eq=False)
class OwnEmulator:
    """One that lives as long as the run, in this process."""

    make_ipe: Callable[[], Ipe]
    facts: Declared
    _ipe: Ipe | None = field(default=None, init=False)
    _server: SecurityFsServer | None = field(default=None, init=False)
    _fuse: tuple[int, int] = field(default=(-1, -1), init=False)

    @property
    def securityfs(self) -> Path | None:
        """None: it gets one of its own."""
        return None

    @property
    def volumes(self) -> Sequence[Path]:
        """Those that the facts declare."""
        return [Path(os.fsdecode(entry.path)) for entry in self.facts.entries if is_volume(entry)]

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Start the server, whose imports are slow, and make the model meanwhile."""
        self._server = SecurityFsServer(report, sandbox.kill)
        self._server.start()
        self._ipe = self.make_ipe()
        self._fuse = sandbox.fuse()

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Serve the securityfs; a volume's facts hold on the mount that the sandbox made of it."""
        assert self._ipe is not None  # noqa: S101 - `begin` came before
        assert self._server is not None  # noqa: S101 - likewise
        facts = self.facts.in_sandbox()
        self._server.serve(self._fuse, self._ipe, facts, surroundings)
        return self._ipe, facts

    def end(self) -> None:
        """End the server; it may be at its first imports still."""
        if self._server is not None:
            self._server.stop()
            self._server.join()

    @property
    def refusals(self) -> Sequence[UpstreamRefusal]:
        """What the model noted."""
        return self._ipe.upstream_refusals if self._ipe is not None else ()


@define(eq=False)
class MountedEmulator:
    """One that is mounted on a directory, by ``ipe-emu mount``, and asked through its control socket.

    Must be made before this process enters another user namespace: from there the emulator lets nobody speak.
    UserError if none is mounted there by this user.
    """

    directory: Path
    _ipe: "RemoteIpe" = field(init=False)
    _attachment: "Connection" = field(init=False)

    def __attrs_post_init__(self) -> None:
        from ipe_securityfs.client import Connection, RemoteIpe  # noqa: PLC0415 - most runs have no use for it

        self._ipe = RemoteIpe(Connection.open(self.directory))
        self._attachment = Connection.open(self.directory)
        # Only an answer shows that the emulator has looked at us; that it does but once.
        self._attachment.request("status")

    @property
    def securityfs(self) -> Path | None:
        """Where it is mounted."""
        return Path(self._ipe.connection.mountpoint)

    @property
    def volumes(self) -> Sequence[Path]:
        """None: its facts are its own, and made nothing a mount."""
        return ()

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Nothing is to be done: it is there."""

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Have the capabilities of the sandbox's root count on the mount."""
        from ipe_securityfs.client import attach  # noqa: PLC0415 - as above

        attach(self._attachment, surroundings.user_namespace)
        return self._ipe, self._ipe

    def end(self) -> None:
        """Hang up, upon which the sandbox's capabilities count no more."""
        self._ipe.connection.close()
        self._attachment.close()

    @property
    def refusals(self) -> Sequence[UpstreamRefusal]:
        """None: its own ``status`` says it."""
        return ()
