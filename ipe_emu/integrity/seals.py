"""Files that were sealed by fs-verity during a rehearsal, and their facts.

A seal belongs to an inode, as on a kernel (``inode->i_verity_info``), whatever names lead to it. Nothing is written to
the file system: the seals end with the rehearsal.
"""

import os
import stat
import threading
from collections.abc import Iterable
from typing import Protocol

from attrs import define, field, frozen

from ipe_emu.integrity import fsverity
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import Parameters
from ipe_emu.integrity.sources import OpenFile, Place, tells_changes


class Holder(Protocol):
    """What keeps the numbers of inodes from being given to others (``linux.inotify.InodeWatch``)."""

    def hold(self, fd: int) -> int:
        """Hold the inode behind ``fd``, and return a name for it."""

    def ended(self) -> Iterable[int]:
        """Return the names of inodes that are not held any more."""


@frozen
class Seal:
    """What a sealed file carries: struct fsverity_descriptor, and a builtin signature that was verified, or none."""

    parameters: Parameters
    descriptor: bytes
    signature: bytes = b""

    @property
    def digest(self) -> Digest:
        """What FS_IOC_MEASURE_VERITY gives."""
        return fsverity.file_digest(self.parameters.algorithm, self.descriptor)

    @property
    def facts(self) -> Facts:
        """What IPE knows of the file by it."""
        return Facts(fsverity_digest=self.digest, fsverity_signature=bool(self.signature))


@define(eq=False)
class _Sealed:
    """A sealed inode: ``state`` is how it was when its content was last known to be the sealed one."""

    seal: Seal
    facts: Facts
    held_as: int
    state: tuple[int, ...]


def _state(st: os.stat_result) -> tuple[int, ...]:
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


@define(eq=False)
class Seals:
    """All sealed files, by inode; thread-safe. A source of facts (``sources.FactsSource``)."""

    _holder: Holder
    _by_inode: dict[tuple[int, int], _Sealed] = field(factory=dict, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    def add(self, fd: int, st: os.stat_result, seal: Seal) -> None:
        """Seal the file behind ``fd``, whose status was ``st`` when the seal was made; OSError if it cannot be held."""
        with self._lock:
            self._forget_the_dead()
            held_as = self._holder.hold(fd)
            self._by_inode[st.st_dev, st.st_ino] = _Sealed(seal, seal.facts, held_as, _state(st))

    def of(self, st: os.stat_result) -> Seal | None:
        """Return the seal of a file, None if it has none."""
        found = self._find(st)
        return None if found is None else found.seal

    def __bool__(self) -> bool:
        return bool(self._by_inode)

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what is known of a sealed file; nothing if its content is another by now.

        That could not happen on a kernel. Here it can, for the seal binds the rehearsed tree alone.
        """
        found = self._find(st) if stat.S_ISREG(st.st_mode) else None
        if found is None:
            return NO_FACTS
        if found.state != _state(st) or not tells_changes(place):
            if not _has_content_of(found.seal, open_file):
                return NO_FACTS
            found.state = _state(st)
        return found.facts

    def _find(self, st: os.stat_result) -> _Sealed | None:
        if not self._by_inode:
            return None
        with self._lock:
            self._forget_the_dead()
            return self._by_inode.get((st.st_dev, st.st_ino))

    def _forget_the_dead(self) -> None:
        ended = set(self._holder.ended())
        if ended:
            self._by_inode = {ino: sealed for ino, sealed in self._by_inode.items() if sealed.held_as not in ended}


def _has_content_of(seal: Seal, open_file: OpenFile) -> bool:
    try:
        fd = open_file()
    except OSError:
        return False
    try:
        return fsverity.descriptor(fd, seal.parameters) == seal.descriptor
    except OSError:
        return False
    finally:
        os.close(fd)
