"""Overlays that the tree mounts: which file of which layer stands behind a file (``d_real_inode()``).

IPE looks at the real inode for what dm-verity and fs-verity say, and at the overlay's own superblock for
boot_verified. What is mapped, however, is the layer's file (``backing_file_open()``), and mprotect(2) asks about that.

No call tells which layer a file comes from. It is the topmost one that has the path: had one above it something that
hides it, the overlay would not show it. That holds without redirected directories, which an overlay mounted in a user
namespace does not have, being unable to write or read the attributes for them. The layers are looked up when the
overlay is mounted, for later their paths may lead elsewhere.
"""

import os

from attrs import define, evolve, field, frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.integrity.facts import Facts
from ipe_emu.integrity.sources import FactsSource, OpenFile, Place, united
from ipe_emu.linux import openat2
from ipe_emu.linux.mountinfo import Location, OwnMounts, Superblocks
from ipe_emu.linux.overlayfs import WITHIN, Options, shown


@frozen(eq=False)
class Layer:
    """A directory that is a layer: ``fd`` is open on it, whatever becomes of the mounts that led there."""

    fd: int
    identity: tuple[int, int]
    location: Location
    superblock: str
    #: The layers of the overlay that it lies on, if it does.
    within: "Overlay | None"


@frozen(eq=False)
class Overlay:
    """An overlay that was mounted, or whose mounting was tried. ``why_not`` says why its layers are not known."""

    layers: tuple[Layer, ...] = ()
    why_not: str = ""

    def is_same(self, other: "Overlay") -> bool:
        """Whether it has the same layers."""
        return [layer.identity for layer in self.layers] == [layer.identity for layer in other.layers]


@frozen
class Real:
    """The file of a layer: its path there as the kernel has it (``d_path()`` of the private mount of the layer)."""

    path: bytes
    superblock: str
    location: Location
    status: os.stat_result
    open_file: OpenFile


@define(eq=False)
class Overlays:
    """Knows the layers of the overlays of one machine, and the facts of files on them.

    ``facts`` are those of other files, those on overlays of this machine's own among them; ``known`` is that part of
    them which is known of whatever lies on the tree's overlays themselves.

    The calls may come from any thread, but mounts are noted in one.
    """

    facts: FactsSource
    known: FactsSource
    superblocks: Superblocks
    _own_mounts: OwnMounts = field(factory=OwnMounts, init=False)
    _noted: dict[Options, Overlay] = field(factory=dict, init=False)
    _devices: dict[str, Overlay | None] = field(factory=dict, init=False)

    def note(self, options: Options, overlay: Overlay) -> None:
        """Take note of an overlay that is about to be mounted; whether it will be is not known."""
        known = self._noted.get(options)
        if known is None:
            self._noted[options] = overlay
        elif not known.is_same(overlay):
            self._noted[options] = Overlay(why_not="its directories were others before, under the same names")

    def knows(self, options: Options, overlay: Overlay) -> bool:
        """Whether this very overlay was noted before."""
        known = self._noted.get(options)
        return known is not None and known.is_same(overlay)

    def of_device(self, device: str) -> Overlay | None:
        """Return the overlay with a device number (``major:minor``), which was bound; None if that is none of ours."""
        return self._devices.get(device)

    def bind(self, pid: int, device: str) -> None:
        """Find out which overlay has a device number (``major:minor``), from the mounts that a process sees.

        Each time: when an overlay is gone, the next one may get its number.
        """
        if self._own_mounts.of_device(device) is not None:
            self._devices[device] = None  # this machine's own: it was there before the tree
            return
        entry = self.superblocks.mount_of(pid, device)
        options = None if entry is None else Options.of(entry.options)
        found = None if options is None else self._noted.get(options)
        self._devices[device] = found or Overlay(why_not="its layers are not known")

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what holds for one file; see ``FactsSource``. NotJudgedError where its layer cannot be found."""
        real = None if place is None else self.real(place, st)
        if real is None:
            return self.facts.facts_of(place, st, open_file)
        of_layer = self.facts.facts_of(real.location, real.status, real.open_file)
        return united(self.known.facts_of(place, st, open_file), evolve(of_layer, boot_verified=False))

    def real(self, place: Place, st: os.stat_result) -> Real | None:
        """Return the file of a layer behind a file at ``place`` with status ``st``; None if that is on no overlay.

        NotJudgedError where it cannot be found.
        """
        overlay = self.of_device(place.device)
        if overlay is None:
            return None
        return _real(overlay, place.path, st)


def _real(overlay: Overlay, path: bytes, st: os.stat_result) -> Real:
    name = os.fsdecode(path)
    if overlay.why_not:
        raise NotJudgedError(f"{name} on an overlay: {overlay.why_not}")
    for layer in overlay.layers:
        try:
            fd = openat2.open_path(layer.fd, path.lstrip(b"/"), WITHIN)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise NotJudgedError(f"{name} on an overlay: its layers cannot be looked at: {error.strerror}") from None
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        # The overlay shows the status of the layer's file, all but its numbers.
        if shown(status) != shown(st):
            break
        if layer.within is not None:
            return _real(layer.within, _joined(layer.location.path, path), status)
        location = evolve(layer.location, path=_joined(layer.location.path, path))
        return Real(path, layer.superblock, location, status, _opening(layer.fd, path))
    raise NotJudgedError(f"{name} on an overlay: none of its layers has it, or it was deleted")


def _opening(layer: int, path: bytes) -> OpenFile:
    def open_file() -> int:
        fd = openat2.open_path(layer, path.lstrip(b"/"), WITHIN)
        try:
            return os.open(b"/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(fd)

    return open_file


def _joined(directory: bytes, path: bytes) -> bytes:
    return directory.rstrip(b"/") + b"/" + path.lstrip(b"/")
