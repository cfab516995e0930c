"""GUID partition tables, read as the kernel reads them (block/partitions/efi.c; UEFI specification, 5.3)."""

import struct
import uuid
import zlib
from typing import Final

from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.rehearse.block.content import SECTOR, Content
from ipe_emu.rehearse.block.partition import MOST_PARTITIONS, Partition

# signature, revision, header size, header CRC, reserved, own LBA, alternate LBA, first and last usable LBA, disk GUID,
# LBA of the entries, number of entries, size of an entry, CRC of the entries.
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_SIGNATURE: Final = b"EFI PART"
# type GUID, unique GUID, first and last LBA, attributes, name.
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
# KMALLOC_MAX_SIZE of x86_64 and aarch64 with pages of 4 KiB
_LARGEST_TABLE: Final = 4 << 20
_PRIMARY: Final = 1
_PROTECTIVE: Final = 0xEE


@frozen
class _Table:
    alternate_lba: int
    entries: bytes


def read(content: Content, *, force: bool = False) -> tuple[Partition, ...] | None:
    """Return the partitions of a disk; None if it has no GPT that a kernel takes (``find_valid_gpt()``).

    The alternate table is looked at only with ``force``, the kernel's command line option ``gpt``, which also makes
    the protective MBR dispensable. KernelError EIO if the disk cannot be read; UserError for a partition that ends
    before it begins.
    """
    if not force and not _has_protective_mbr(content.read(0, SECTOR)):
        return None
    table = _table_at(content, _PRIMARY)
    if table is None and force:
        table = _table_at(content, content.size // SECTOR - 1)
    return None if table is None else _partitions(table.entries, content.size // SECTOR)


def _has_protective_mbr(sector: bytes) -> bool:
    """Whether an MBR says that a GPT follows (``is_pmbr_valid()``)."""
    if sector[510:512] != b"\x55\xaa":
        return False
    records = (sector[446 + 16 * slot :][:16] for slot in range(4))
    return any(record[4] == _PROTECTIVE and int.from_bytes(record[8:12], "little") == _PRIMARY for record in records)


def _table_at(content: Content, lba: int) -> _Table | None:
    """Return the table whose header is at block ``lba``, if all is as it must be (``is_gpt_valid()``)."""
    last = content.size // SECTOR - 1
    if lba > last:
        return None
    header = content.read(lba * SECTOR, SECTOR)
    (
        signature, _revision, header_size, checksum, _reserved, own_lba, alternate_lba, first_usable, last_usable,
        _disk, entries_lba, number, entry_size, entries_checksum,
    ) = _HEADER.unpack_from(header)  # fmt: skip
    if signature != _SIGNATURE or not _HEADER.size <= header_size <= SECTOR:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:header_size]) != checksum:
        return None
    if own_lba != lba or first_usable > last or last_usable > last or last_usable < first_usable:
        return None
    if entry_size != _ENTRY.size or not 0 < number * entry_size <= _LARGEST_TABLE:
        return None
    size = number * entry_size
    if entries_lba > last or entries_lba * SECTOR + size > content.size:
        return None
    entries = content.read(entries_lba * SECTOR, size)
    if zlib.crc32(entries) != entries_checksum:
        return None
    return _Table(alternate_lba, entries)


def _partitions(entries: bytes, sectors: int) -> tuple[Partition, ...]:
    """Return the partitions that the kernel adds (``efi_partition()``, ``blk_add_partition()``)."""
    found = []
    for index, entry in enumerate(_ENTRY.iter_unpack(entries)):
        if index + 1 >= MOST_PARTITIONS:
            break
        type_guid, own_guid, first, last, _attributes, name = entry
        # is_pte_valid(); one that begins behind the end of the disk does not get here
        if not any(type_guid) or first >= sectors or last >= sectors or last + 1 == first:
            continue
        if last < first:
            raise UserError(
                f"partition {index + 1} of the GPT ends at block {last}, before it begins at block {first}: a kernel"
                " makes a device of impossible size of it"
            )
        found.append(
            Partition(
                number=index + 1,
                start=first,
                sectors=last - first + 1,
                uuid=str(uuid.UUID(bytes_le=own_guid)),
                label=_name(name),
                type=str(uuid.UUID(bytes_le=type_guid)),
                scheme="gpt",
            )
        )
    return tuple(found)


def _name(raw: bytes) -> str:
    return raw.decode("utf-16-le", "replace").partition("\0")[0]
