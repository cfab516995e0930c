"""The partitions of a disk, of whatever kind its table is (block/partitions/core.c, ``check_partition()``)."""

from ipe_emu.rehearse.block import gpt, mbr
from ipe_emu.rehearse.block.content import Content
from ipe_emu.rehearse.block.partition import Partition


def read_partitions(content: Content, *, force_gpt: bool = False) -> tuple[Partition, ...]:
    """Return the partitions that the kernel finds, none if there is no table; see `gpt.read` and `mbr.read`.

    ``force_gpt`` is the kernel's command line option ``gpt``.
    """
    found = gpt.read(content, force=force_gpt)
    if found is None:
        found = mbr.read(content)
    return found or ()
