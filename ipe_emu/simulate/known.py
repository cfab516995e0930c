"""What is known of the files of a tree: what a source says of them, and seals that are taken for given."""

import os
from collections import OrderedDict
from typing import Final

from attrs import define, evolve, field, frozen

from ipe_emu.integrity import fsverity
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.integrity.hash_workers import Progress, no_progress
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.simulate.tree import Tree, reopen

#: Digests of so many files are kept: an interpreter is asked about for every script.
_KEPT: Final = 16_384


@frozen
class Seals:
    """Every file counts as sealed by fs-verity with this algorithm, and its digest as ``signed`` or not.

    ``measured`` is whether the digests are wanted: without a rule that names one, none has to be computed.
    """

    algorithm: str
    signed: bool = False
    measured: bool = True


@define(eq=False)
class Known:
    """What holds for the files of one tree. Where ``source`` has a digest for a file, that one counts."""

    tree: Tree
    source: FactsSource
    seals: Seals | None = None
    jobs: int = 1
    progress: Progress = no_progress
    _digests: "OrderedDict[tuple[int, ...], Digest]" = field(factory=OrderedDict, init=False, repr=False)

    def facts_of(self, path: bytes, fd: int, st: os.stat_result) -> Facts:
        """Return what holds for a file, by its path free of symbolic links and any descriptor of it.

        OSError and KernelError if its digest is wanted and cannot be computed; NotJudgedError if it cannot be read.
        """
        facts = self.source.facts_of(self.tree.locate(path), st, lambda: reopen(fd))
        if self.seals is None or facts.fsverity_digest is not None:
            return facts
        digest = self._digest(fd, st, self.seals.algorithm) if self.seals.measured else None
        return evolve(facts, fsverity_digest=digest, fsverity_signature=self.seals.signed, fsverity_in_doubt=None)

    def _digest(self, fd: int, st: os.stat_result, algorithm: str) -> Digest:
        key = (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        known = self._digests.get(key)
        if known is not None:
            self._digests.move_to_end(key)
            return known
        readable = reopen(fd)
        try:
            digest = fsverity.measure(readable, algorithm, jobs=self.jobs, progress=self.progress)
        finally:
            os.close(readable)
        self._digests[key] = digest
        if len(self._digests) > _KEPT:
            self._digests.popitem(last=False)
        return digest
