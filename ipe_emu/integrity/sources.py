"""Where the facts of a file come from, and how several sources are united."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from attrs import evolve, frozen

from ipe_emu.integrity.facts import NO_FACTS, Facts

#: Opens a file for reading and gives the descriptor, which the caller closes; OSError where that fails.
OpenFile = Callable[[], int]


class Place(Protocol):
    """Where a file lies, whatever its file system is mounted on (``linux.mountinfo.Location``)."""

    @property
    def device(self) -> str:
        """The device number of its file system."""

    @property
    def path(self) -> bytes:
        """Its path on that file system."""

    @property
    def mount_root(self) -> bytes:
        """The directory of that file system beyond which the mount it was reached by shows nothing."""

    @property
    def kind(self) -> str:
        """The type of its file system, as /proc/filesystems names it; empty if that is not known."""


#: On these, whoever writes to a file through a mapping changes its times with each page (``file_update_time()``). On
#: tmpfs he does not: a page that was read before is writable at once.
_TELL_CHANGES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})


def tells_changes(place: Place | None) -> bool:
    """Whether a file whose size and times are as before is sure to have its content as before."""
    return place is not None and place.kind in _TELL_CHANGES


class FactsSource(Protocol):
    """Whatever knows facts of files."""

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what holds for one file; nothing does for a file of which nobody knows where it lies.

        ``open_file`` is called only if the content must be read again. NotJudgedError where a fact holds perhaps.
        """


@frozen(eq=False)
class Combined:
    """Several sources as one. What one of them knows of dm-verity, or of fs-verity, hides what those after it know."""

    sources: Sequence[FactsSource]

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what all of them know together; see ``FactsSource``."""
        facts = NO_FACTS
        for source in self.sources:
            facts = united(facts, source.facts_of(place, st, open_file))
        return facts


def united(facts: Facts, more: Facts) -> Facts:
    """Return both; what the first knows of dm-verity, or of fs-verity, hides what the second does.

    A doubt of one of them stays, unless the other one knows.
    """
    if more is NO_FACTS:
        return facts
    if facts is NO_FACTS:
        return more
    if more.boot_verified:
        facts = evolve(facts, boot_verified=True)
    if facts.dmverity_roothash is None:
        facts = evolve(
            facts,
            dmverity_roothash=more.dmverity_roothash,
            dmverity_signature=more.dmverity_signature,
            dmverity_in_doubt=None if more.dmverity_roothash else facts.dmverity_in_doubt or more.dmverity_in_doubt,
        )
    if facts.fsverity_digest is None:
        facts = evolve(
            facts,
            fsverity_digest=more.fsverity_digest,
            fsverity_signature=more.fsverity_signature,
            fsverity_in_doubt=None if more.fsverity_digest else facts.fsverity_in_doubt or more.fsverity_in_doubt,
        )
    return facts
