"""One partition of a disk, as a value."""

from typing import Final

from attrs import frozen

#: DISK_MAX_PARTS of the kernel: partitions have numbers below this.
MOST_PARTITIONS: Final = 256


@frozen
class Partition:
    """A partition; ``start`` and ``sectors`` count 512 bytes.

    ``uuid`` is what PARTUUID= names it by, ``label`` what PARTLABEL= does, ``type`` its type as blkid prints it,
    ``scheme`` ``gpt`` or ``dos``.
    """

    number: int
    start: int
    sectors: int
    uuid: str = ""
    label: str = ""
    type: str = ""
    scheme: str = "gpt"
