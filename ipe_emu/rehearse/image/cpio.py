"""The header of a cpio member: newc (070701) and crc (070702).

Source: Documentation/driver-api/early-userspace/buffer-format.rst, and ``do_header()`` in init/initramfs.c.
"""

import re
from typing import Final

from attrs import frozen

HEADER_SIZE: Final = 110
#: The longest name with its NUL, and the longest target of a symbolic link without one.
PATH_MAX: Final = 4096
TRAILER: Final = b"TRAILER!!!"

_MAGIC_SIZE: Final = 6
_NEWC: Final = b"070701"
_CRC: Final = b"070702"
_ODC: Final = b"070707"
_FIELDS: Final = 13
_FIELD_SIZE: Final = 8
# What simple_strtoul(…, 16) takes of eight characters: an optional 0x, then digits up to the first other character.
_LENIENT: Final = re.compile(rb"(?:0[xX](?=[0-9A-Fa-f]))?([0-9A-Fa-f]*)")
_STRICT: Final = re.compile(rb"[0-9A-Fa-f]{104}")


class HeaderError(Exception):
    """A header that ends the unpacking; the text is the kernel's message."""


@frozen
class Header:
    """The thirteen numbers of a member, and whether its data has a checksum."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    mtime: int
    size: int
    dev: tuple[int, int]
    rdev: tuple[int, int]
    name_size: int
    checksum: int | None

    @property
    def padded_name_size(self) -> int:
        """Bytes from the header's end to the data: header and name together are a multiple of four."""
        return align(HEADER_SIZE + self.name_size) - HEADER_SIZE


@frozen
class Entry:
    """One member of an archive. ``name`` ends at its first NUL; ``target`` is a symbolic link's.

    ``mtime`` is seconds since the epoch; ``dev`` and ``rdev`` are (major, minor); ``size`` is the bytes of its data,
    which its archive gives as long as this entry is the last one that was taken from it.
    """

    name: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    mtime: int = 0
    size: int = 0
    ino: int = 0
    dev: tuple[int, int] = (0, 0)
    rdev: tuple[int, int] = (0, 0)
    target: bytes | None = None


def align(offset: int) -> int:
    """Return the next multiple of four."""
    return (offset + 3) & ~3


def parse_header(data: bytes, *, strict: bool) -> Header:
    """Read ``HEADER_SIZE`` bytes. HeaderError with the message of ``do_header()``.

    ``strict``: every character must be a hexadecimal digit, as newer kernels want it.
    """
    magic = data[:_MAGIC_SIZE]
    if magic == _ODC:
        raise HeaderError("incorrect cpio method used: use -H newc option")
    if magic not in (_NEWC, _CRC):
        raise HeaderError("no cpio magic")
    if strict and not _STRICT.fullmatch(data, _MAGIC_SIZE):
        raise HeaderError("damaged header")
    numbers = [
        _number(data[start : start + _FIELD_SIZE])
        for start in range(_MAGIC_SIZE, _MAGIC_SIZE + _FIELDS * _FIELD_SIZE, _FIELD_SIZE)
    ]
    ino, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, name_size, checksum = numbers
    return Header(
        ino, mode & 0xFFFF, uid, gid, nlink, mtime, size, (major, minor), _device(rmajor, rminor), name_size,
        checksum if magic == _CRC else None,
    )  # fmt: skip


def pack_header(entry: Entry) -> bytes:
    """Return the newc header of an entry, with its name, its padding, and its target if it has one.

    ValueError for a number of more than 32 bits.
    """
    name = entry.name + b"\0"
    data = entry.target or b""
    numbers = (
        entry.ino, entry.mode, entry.uid, entry.gid, entry.nlink, entry.mtime, entry.size or len(data),
        *entry.dev, *entry.rdev, len(name), 0,
    )  # fmt: skip
    if any(number >> 32 for number in numbers):
        raise ValueError("cpio has 32 bits for each number")
    member = _NEWC + b"".join(b"%08x" % number for number in numbers) + name
    return _padded(_padded(member) + data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _device(major: int, minor: int) -> tuple[int, int]:
    """Return what is left of a device number in a dev_t: 12 bits of major, 20 of minor (``MKDEV()``)."""
    number = (major << 20 | minor) & 0xFFFFFFFF
    return number >> 20, number & 0xFFFFF


def _number(field: bytes) -> int:
    try:
        return int(field, 16) if field.isalnum() else _leniently(field)
    except ValueError:
        return _leniently(field)


def _leniently(field: bytes) -> int:
    found = _LENIENT.match(field)
    return int(found[1], 16) if found and found[1] else 0
