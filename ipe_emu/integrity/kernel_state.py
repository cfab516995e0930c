"""Facts that this machine's own kernel vouches for: files sealed by fs-verity, file systems on dm-verity devices."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

from attrs import define, evolve, field

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.integrity.dm_verity.table import VerityTable
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import FILE_SYSTEMS, MAX_SIGNATURE_SIZE, sealed_digest
from ipe_emu.integrity.sources import FactsSource, OpenFile, Place, united

_OVERLAY: Final = "overlay"
_NO_LAYER: Final = "which layer of its overlay the file comes from cannot be told from here"


class LayerFile(Protocol):
    """The file of a layer behind one on an overlay."""

    @property
    def location(self) -> Place:
        """Where it lies."""

    @property
    def status(self) -> os.stat_result:
        """Its own status."""

    def open(self) -> int:
        """Open it for reading."""


class OverlayState(Protocol):
    """An overlay that this machine has (``linux.overlayfs.MachineOverlay``)."""

    @property
    def separate_data(self) -> bool:
        """Whether the content of a file may come from another one than its status."""

    @property
    def some_seals(self) -> bool:
        """Whether any file of this machine may be sealed by fs-verity."""

    def may_lie_on_verity(self, st: os.stat_result) -> bool:
        """Whether the layer's file behind one with this status may lie on a dm-verity device."""

    def layer_file(self, path: bytes, st: os.stat_result) -> AbstractContextManager[LayerFile | None]:
        """Find the layer's file behind the one at ``path`` with status ``st``; None if that cannot be told."""


class Kernel(Protocol):
    """This machine's kernel, as far as it is asked (``linux.verity_state``)."""

    def measure_verity(self, fd: int) -> tuple[int, bytes]:
        """Ask for the digest of a sealed file (FS_IOC_MEASURE_VERITY): the algorithm's number and the digest."""

    def read_signature(self, fd: int, limit: int) -> bytes:
        """Ask for the builtin signature of a sealed file; nothing if it has none."""

    def is_sealed(self, fd: int) -> bool:
        """Ask whether a file is sealed; on an overlay, whether the layer's file is that has its status (statx(2))."""

    def verity_table(self, device: str) -> str | None:
        """Ask for the parameters of the dm-verity target that a device consists of; None if it is no such device.

        PermissionError where this process may not see them.
        """

    def overlay(self, device: str) -> OverlayState | None:
        """Ask for an overlay by its device number; None if this process sees none with that."""


@define(eq=False)
class KernelState:
    """Adds to what another source knows what this machine's kernel does. What that source says goes first.

    ``verify`` raises KernelError unless the *emulated* machine's keys verify the builtin signature of a digest; None
    where they are elsewhere.
    """

    known: FactsSource
    kernel: Kernel
    verify: Callable[[Digest, bytes], None] | None
    _without_fsverity: set[int] = field(factory=set, init=False)

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what holds for a file; see ``FactsSource``.

        Raises KernelError as open(2) on the emulated kernel for a file whose builtin signature it would not verify.
        """
        facts = self.known.facts_of(place, st, open_file)
        if place is None:
            return facts
        if place.kind == _OVERLAY:
            return united(facts, self._of_layer(place, st, open_file))
        if facts.dmverity_roothash is None:
            facts = self._with_device(facts, place.device)
        if facts.fsverity_digest is None and stat.S_ISREG(st.st_mode) and place.kind in FILE_SYSTEMS:
            facts = self._with_seal(facts, st, open_file)
        return facts

    def _of_layer(self, place: Place, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what holds for the file of a layer that stands behind one on an overlay of this machine.

        IPE asks that one (``d_real_inode()``), and the overlay itself for boot_verified.
        """
        overlay = self.kernel.overlay(place.device)
        if overlay is None:
            return Facts(dmverity_in_doubt=_NO_LAYER, fsverity_in_doubt=_NO_LAYER)
        on_verity = overlay.may_lie_on_verity(st)
        sealed = overlay.some_seals and (overlay.separate_data or self._may_be_sealed(open_file))
        if not on_verity and not sealed:
            return NO_FACTS
        with overlay.layer_file(place.path, st) as real:
            if real is not None:
                return evolve(self.facts_of(real.location, real.status, real.open), boot_verified=False)
        return Facts(
            dmverity_in_doubt=_NO_LAYER if on_verity else None, fsverity_in_doubt=_NO_LAYER if sealed else None
        )

    def _may_be_sealed(self, open_file: OpenFile) -> bool:
        try:
            fd = open_file()
        except OSError:
            return True
        try:
            return self.kernel.is_sealed(fd)
        finally:
            os.close(fd)

    def _with_device(self, facts: Facts, device: str) -> Facts:
        try:
            parameters = self.kernel.verity_table(device)
        except PermissionError:
            doubt = "whose root hash only root may see: run as root, or declare it (--integrity)"
            return evolve(facts, dmverity_in_doubt=f"the file lies on the dm-verity device {device}, {doubt}")
        if parameters is None:
            return facts
        try:
            table = VerityTable.parse(parameters)
        except UserError as error:
            doubt = f"the dm-verity device {device} has a table that is not understood: {error}"
            return evolve(facts, dmverity_in_doubt=doubt)
        if table.signature_key is not None:
            # It was verified, but by the keys of this machine, and it cannot be read back to ask the others.
            # Where they do not verify it, the device is not there at all.
            raise NotJudgedError(
                f"the file lies on the dm-verity device {device}, whose root hash is signed; whether the emulated"
                " machine's keys verify the signature cannot be known: declare it (--integrity)"
            )
        return evolve(facts, dmverity_roothash=table.root_hash)

    def _with_seal(self, facts: Facts, st: os.stat_result, open_file: OpenFile) -> Facts:
        if st.st_dev in self._without_fsverity:
            return facts
        try:
            fd = open_file()
        except OSError:
            return facts  # whoever executes it may read it, or nearly always so; nothing is known of it here
        try:
            digest = sealed_digest(fd, self._measure(st.st_dev))
            if digest is None:
                return facts
            signature = self.kernel.read_signature(fd, MAX_SIGNATURE_SIZE)
        finally:
            os.close(fd)
        if signature:
            if self.verify is None:
                raise NotJudgedError("the file has a builtin fs-verity signature, and the keys for it are not here")
            self.verify(digest, signature)
        return evolve(facts, fsverity_digest=digest, fsverity_signature=bool(signature))

    def _measure(self, device: int) -> Callable[[int], tuple[int, bytes]]:
        def measure(fd: int) -> tuple[int, bytes]:
            try:
                return self.kernel.measure_verity(fd)
            except OSError as error:
                if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                    self._without_fsverity.add(device)
                raise

        return measure
