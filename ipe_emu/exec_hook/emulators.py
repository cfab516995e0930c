"""What judges a run: an emulator of its own, or one that is mounted already (``run --attach``)."""

import functools
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from attrs import define, field

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.exec_hook.hook import Judge
from ipe_emu.exec_hook.keyctl import Keyctl
from ipe_emu.exec_hook.overlays import Overlays
from ipe_emu.exec_hook.report import Report
from ipe_emu.exec_hook.sandbox import Sandbox, Surroundings
from ipe_emu.exec_hook.sealing import Sealing
from ipe_emu.exec_hook.supervisor import SecurityFsServer, Served
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.integrity.declared import Declared, is_volume
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.kernel_state import KernelState
from ipe_emu.integrity.seals import Seals
from ipe_emu.integrity.sources import Combined, FactsSource, Place
from ipe_emu.linux import process
from ipe_emu.linux.inotify import InodeWatch
from ipe_emu.linux.mountinfo import OF_THIS_MACHINE, Superblocks
from ipe_emu.linux.verity_state import VerityState
from ipe_emu.lsm import Ipe, UpstreamRefusal
from ipe_emu.volumes.facts import VolumeFacts

if TYPE_CHECKING:
    from ipe_emu.volumes.ext4_seals import ImageSeals
    from ipe_emu.volumes.image import VerifiedImage
    from ipe_securityfs.client import Connection, RemoteIpe


def _no_keys(*_: object) -> None:
    """Verify nothing: nothing can be sealed where this is asked."""
    raise NotJudgedError("the keys for fs-verity signatures are not here")


class Emulator(Protocol):
    """The calls come in the order of these methods; ``end`` comes in any case, once the sandbox is dead."""

    @property
    def securityfs(self) -> Path | None:
        """Where a securityfs is mounted that the tree is to see; None if it gets one of its own."""

    @property
    def volumes(self) -> Sequence[Path]:
        """The directories that become read-only mounts of their own, for dm-verity facts are declared of them."""

    @property
    def superblocks(self) -> Superblocks:
        """What is known of those of the rehearsed machine."""

    @property
    def traps(self) -> Sequence[Trap]:
        """The system calls of the tree that it wants to see beside the exec hook's own."""

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Do what can be done while the sandbox is being made."""

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Serve the finished sandbox; return who decides, and who knows the facts of files."""

    def check(self) -> None:
        """Raise NotJudgedError if something that the tree relied on ended before it did."""

    def end(self) -> None:
        """Stop serving."""

    @property
    def refusals(self) -> Sequence[UpstreamRefusal]:
        """What a released kernel would have refused."""


@define(eq=False)
class OwnEmulator:
    """One that lives as long as the run, in this process.

    ``sealable`` are the directories in which files can be sealed (`Sealing`), ``dm_verity_unsealed`` is a kernel
    parameter (`Keyctl.begin`).
    """

    make_ipe: Callable[[], Ipe]
    facts: Declared
    images: "Mapping[str, VerifiedImage]" = field(factory=dict)
    sealable: Sequence[Place] = ()
    dm_verity_unsealed: bool = False
    _sealing: Sealing = field(init=False)
    _seals_of_images: "ImageSeals | None" = field(default=None, init=False)
    _keyctl: Keyctl = field(factory=Keyctl, init=False)
    _ipe: Ipe | None = field(default=None, init=False)
    _server: SecurityFsServer | None = field(default=None, init=False)
    _known: FactsSource = field(init=False)
    superblocks: Superblocks = field(factory=Superblocks, init=False)
    #: By the name of the volume: a pidfd of the program that serves it.
    _helpers: dict[str, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if self.images:
            from ipe_emu.volumes.ext4_seals import ImageSeals  # noqa: PLC0415 - most runs have no volumes

            self._seals_of_images = ImageSeals(self._verify_fsverity)
        self._sealing = Sealing(Seals(InodeWatch()), self.sealable, self._verify_fsverity, self._seals_of_images)

    @property
    def securityfs(self) -> Path | None:
        """None: it gets one of its own."""
        return None

    @property
    def volumes(self) -> Sequence[Path]:
        """Those that the facts declare."""
        return [Path(os.fsdecode(entry.path)) for entry in self.facts.entries if is_volume(entry)]

    @property
    def traps(self) -> Sequence[Trap]:
        """Those for fs-verity, and for keys."""
        return (*self._sealing.traps, *self._keyctl.traps)

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Start the server, whose imports are slow, and make the model meanwhile."""
        self._server = SecurityFsServer(report, sandbox.kill)
        self._server.start()
        self._ipe = self.make_ipe()
        of_volumes = VolumeFacts()
        # A declared volume's facts hold on the mount that the sandbox made of it.
        of_images: list[FactsSource] = [] if self._seals_of_images is None else [of_volumes, self._seals_of_images]
        known = Combined([*of_images, self.facts.in_sandbox(), self._sealing.seals])
        of_kernel = KernelState(known, VerityState(), self._ipe.verify_fsverity_signature)
        self._known = Overlays(of_kernel, known, self.superblocks)
        fuse, surroundings = sandbox.fuse()
        self._keyctl.begin(self._ipe, surroundings.root, dm_verity_unsealed=self.dm_verity_unsealed)
        for name, image in self.images.items():
            image.on_corruption = functools.partial(self._corrupted, sandbox, report, name)
            image.verify_signature(self._ipe.keyrings, self._ipe.profile)
        texts = {"keys": self._keyctl.proc_keys}
        self._server.serve(
            fuse, Served(self._ipe, self._known, surroundings, self.superblocks, self.images, report, texts)
        )
        for name, image in self.images.items():
            try:
                device, root, helper = sandbox.volume()
            except UserError as error:
                raise UserError(f"{image.specification.image}: {error}") from None
            of_volumes.add(device, image.facts)
            number = f"{os.major(device)}:{os.minor(device)}"
            self.superblocks.names[number] = name
            if image.seals is not None and self._seals_of_images is not None:
                image.seals.check_numbers(root)
                self._seals_of_images.by_device[number] = image.seals
            if helper is not None:
                self._helpers[name] = helper

    def _corrupted(self, sandbox: Sandbox, report: Report, name: str, what: str) -> None:
        """Note that a block could not be read; where its reader would hide that, it must not live to do so."""
        report.corrupted(what)
        if not self.images[name].hides_errors:
            return
        report.failed(f"{name} changed while it was used, and the program that serves it does not pass on such errors")
        if name in self._helpers:
            process.send_signal(self._helpers[name], signal.SIGKILL)
        else:
            sandbox.kill()

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Serve the securityfs, which was begun before."""
        self._keyctl.show_beside(surroundings.keys)
        assert self._ipe is not None  # noqa: S101 - `begin` came before
        return self._ipe, self._known

    def _verify_fsverity(self, digest: Digest, signature: bytes) -> None:
        assert self._ipe is not None  # noqa: S101 - nothing is sealed before `attach`
        self._ipe.verify_fsverity_signature(digest, signature)

    def check(self) -> None:
        """Look whether the programs that serve volumes live."""
        ended = select.select([*self._helpers.values()], [], [], 0)[0]
        for name, helper in self._helpers.items():
            if helper in ended:
                raise NotJudgedError(f"the program that serves {name} ended before the command did")

    def end(self) -> None:
        """End the server; it may be at its first imports still."""
        for helper in self._helpers.values():
            os.close(helper)
        self._helpers.clear()
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

    @property
    def superblocks(self) -> Superblocks:
        """This machine's, as the emulator knows them."""
        return OF_THIS_MACHINE

    @property
    def traps(self) -> Sequence[Trap]:
        """What reports that nothing can be sealed: its facts are its own."""
        return Sealing(Seals(InodeWatch()), (), _no_keys).traps

    def begin(self, sandbox: Sandbox, report: Report) -> None:
        """Nothing is to be done: it is there."""

    def attach(self, surroundings: Surroundings) -> tuple[Judge, FactsSource]:
        """Have the capabilities of the sandbox's root count on the mount."""
        from ipe_securityfs.client import attach  # noqa: PLC0415 - as above

        attach(self._attachment, surroundings.user_namespace)
        return self._ipe, Overlays(KernelState(self._ipe, VerityState(), None), self._ipe, self.superblocks)

    def check(self) -> None:
        """Nothing of ours serves the tree."""

    def end(self) -> None:
        """Hang up, upon which the sandbox's capabilities count no more."""
        self._ipe.connection.close()
        self._attachment.close()

    @property
    def refusals(self) -> Sequence[UpstreamRefusal]:
        """None: its own ``status`` says it."""
        return ()
