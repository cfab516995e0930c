"""Facts that belong to a whole superblock: boot_verified to the root file system, dm-verity to a volume."""

import os

from attrs import define, field

from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.integrity.sources import OpenFile, Place


@define(eq=False)
class SuperblockFacts:
    """A facts source by the device number (``major:minor``) of the mount that a file lies on.

    Not by the st_dev of the file: a file of an overlay can carry that of the layer it comes from.
    """

    by_device: dict[str, Facts] = field(factory=dict)

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:  # noqa: ARG002 - of every facts source
        """Return what holds for every file of the superblock."""
        return NO_FACTS if place is None else self.by_device.get(place.device, NO_FACTS)
