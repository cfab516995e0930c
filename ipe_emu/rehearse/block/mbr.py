"""Partition tables of the DOS kind, read as the kernel reads them (block/partitions/msdos.c)."""

import struct
from collections.abc import Iterator
from typing import Final

from attrs import evolve, frozen

from ipe_emu.errors import UserError
from ipe_emu.rehearse.block.content import SECTOR, Content
from ipe_emu.rehearse.block.partition import MOST_PARTITIONS, Partition

_MAGIC: Final = b"\x55\xaa"
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_GPT: Final = 0xEE
# Types under which the kernel looks for tables of other systems, each a source file of its own; 0x82 is Linux swap too.
_WITH_SLICES: Final = {
    0xA5: "FreeBSD",
    0xA6: "OpenBSD",
    0xA9: "NetBSD",
    0x81: "Minix",
    0x63: "UnixWare",
    0xBF: "Solaris",
}
_SWAP_OR_SOLARIS: Final = 0x82
_SOLARIS_SANE: Final = b"\xee\xde\x0d\x60"
_AIX: Final = b"\xc9\xc2\xd4\xc1"
# Links that parse_extended() follows without finding a partition.
_MOST_EMPTY_LINKS: Final = 100
_RECORD: Final = struct.Struct("<B3sB3sII")
_FIRST_LOGICAL: Final = 5


@frozen
class _Record:
    boot: int
    type: int
    start: int
    sectors: int


def read(content: Content) -> tuple[Partition, ...] | None:
    """Return the partitions of a disk; None if there is no such table (``msdos_partition()``).

    A table that begins a GPT is none. UserError for tables of other systems inside, which a kernel reads as well.
    """
    sector = content.read(0, SECTOR)
    if sector.startswith(_AIX):
        raise UserError("the disk has a label of AIX, which cannot be read here")
    if sector[510:512] != _MAGIC:
        return None
    records = _records(sector)
    if any(record.boot not in {0, 0x80} for record in records) or any(record.type == _GPT for record in records):
        return None
    signature = int.from_bytes(sector[440:444], "little")
    primary: list[Partition] = []
    logical: list[Partition] = []
    for slot, record in enumerate(records, start=1):
        if not record.sectors:
            continue
        _check_slices(content, slot, record)
        if record.type in _EXTENDED:
            # Two sectors of it are a device, so that boot loaders can be put there and nothing else.
            primary.append(Partition(slot, record.start, min(record.sectors, 2), "", "", f"{record.type:#x}", "dos"))
            number = _FIRST_LOGICAL + len(logical)
            logical += _logical(content, record, number, signature)
        else:
            primary.append(_partition(slot, record, 0, signature))
    return tuple(fitted for found in primary + logical if (fitted := _fitted(found, content.size // SECTOR)))


def _records(sector: bytes) -> list[_Record]:
    found = []
    for boot, _, kind, _, start, sectors in _RECORD.iter_unpack(sector[446:510]):
        found.append(_Record(boot, kind, start, sectors))
    return found


def _partition(number: int, record: _Record, base: int, signature: int) -> Partition:
    return Partition(
        number, base + record.start, record.sectors, f"{signature:08x}-{number:02x}", "", f"{record.type:#x}", "dos"
    )


def _fitted(partition: Partition, sectors: int) -> Partition | None:
    """Return a partition cut at the end of the disk, None if it begins behind it (``blk_add_partition()``)."""
    if partition.start >= sectors:
        return None
    return evolve(partition, sectors=min(partition.sectors, sectors - partition.start))


def _logical(content: Content, extended: _Record, number: int, signature: int) -> Iterator[Partition]:
    """Follow the chain of tables in an extended partition (``parse_extended()``)."""
    here, size = extended.start, extended.sectors
    empty = 0
    while empty < _MOST_EMPTY_LINKS and number < MOST_PARTITIONS:
        empty += 1
        sector = content.read(here * SECTOR, SECTOR)
        if sector[510:512] != _MAGIC:
            return
        records = _records(sector)
        for slot, record in enumerate(records):
            if not record.sectors or record.type in _EXTENDED:
                continue
            begin, end = here + record.start, here + record.start + record.sectors
            # The last two are believed only if they lie within.
            if slot >= 2 and (
                record.start + record.sectors > size
                or begin < extended.start
                or end > extended.start + extended.sectors
            ):
                continue
            yield _partition(number, record, here, signature)
            empty = 0
            number += 1
            if number == MOST_PARTITIONS:
                return
        link = next((record for record in records if record.sectors and record.type in _EXTENDED), None)
        if link is None:
            return
        here, size = extended.start + link.start, link.sectors


def _check_slices(content: Content, slot: int, record: _Record) -> None:
    system = _WITH_SLICES.get(record.type)
    if record.type == _SWAP_OR_SOLARIS and content.read((record.start + 1) * SECTOR, SECTOR)[12:16] == _SOLARIS_SANE:
        system = "Solaris"
    if system:
        raise UserError(
            f"partition {slot} of the MBR is one of {system}, whose own partition table cannot be read here"
        )
