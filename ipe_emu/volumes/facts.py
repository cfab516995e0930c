"""What IPE knows of files on volumes: dm-verity belongs to the block device of the superblock."""

import os

from attrs import define, field

from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.integrity.sources import OpenFile, Place


@define(eq=False)
class VolumeFacts:
    """Facts by the device number (``major:minor``) of the file system that stands for a volume.

    They hold for all of that file system, through whatever mount of it, and for nothing that is mounted over it.
    """

    _devices: dict[str, Facts] = field(factory=dict, init=False)

    def add(self, device: int, facts: Facts) -> None:
        """Say what holds on the file system with this st_dev."""
        self._devices[f"{os.major(device)}:{os.minor(device)}"] = facts

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:  # noqa: ARG002 - protocol
        """Return what holds for one file; see ``FactsSource``."""
        return NO_FACTS if place is None else self._devices.get(place.device, NO_FACTS)
