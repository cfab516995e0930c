"""A unified kernel image: a PE file whose sections hold what a boot loader hands over (UAPI.5, systemd-stub(7)).

Sections of the selected profile stand in for those of the same name before the first ``.profile``.
"""

import os
import struct
from typing import Final

from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.rehearse.image.buffer import Piece

_DOS_MAGIC: Final = b"MZ"
_PE_MAGIC: Final = b"PE\0\0"
_PE_OFFSET: Final = 0x3C
_COFF_HEADER: Final = struct.Struct("<4sHHIIIHH")
# Name, VirtualSize, VirtualAddress, SizeOfRawData, PointerToRawData; relocations and line numbers are of no interest.
_SECTION: Final = struct.Struct("<8sIIII16x")
_TEXT_LIMIT: Final = 1 << 20
_CONTROLS: Final = dict.fromkeys(range(0x20), " ")


@frozen
class Section:
    """A section's name, and where its data is in the file: as much as is both there and loaded."""

    name: str
    offset: int
    size: int


@frozen
class Uki:
    """What the stub hands to the kernel. ``initrds`` are in the order in which they end up in memory."""

    initrds: tuple[Piece, ...]
    cmdline: str | None
    uname: str | None


def is_pe(start: bytes) -> bool:
    """Tell a PE file by its first two bytes."""
    return start.startswith(_DOS_MAGIC)


def read_sections(fd: int) -> list[Section]:
    """Return the sections in their order. UserError if this is no PE file, or a section is not within it."""
    size = os.fstat(fd).st_size
    (pe_offset,) = struct.unpack("<I", _read(fd, _PE_OFFSET, 4, "the offset of its PE header"))
    header = _read(fd, pe_offset, _COFF_HEADER.size, "its PE header")
    magic, _, count, _, _, _, optional_size, _ = _COFF_HEADER.unpack(header)
    if magic != _PE_MAGIC:
        raise UserError(f"no PE file: at byte {pe_offset} is {magic!r}, not {_PE_MAGIC!r}")
    table = _read(fd, pe_offset + _COFF_HEADER.size + optional_size, count * _SECTION.size, "its section table")
    sections = []
    for raw_name, virtual_size, _, raw_size, offset in _SECTION.iter_unpack(table):
        name = raw_name.rstrip(b"\0").decode("latin-1")
        length = min(virtual_size, raw_size)
        if offset + length > size:
            raise UserError(
                f"the section {name!r} has {length} bytes from byte {offset} on, and the file ends at {size}: it was"
                " cut, or badly made"
            )
        sections.append(Section(name, offset, length))
    return sections


def read_uki(fd: int, profile: int | None = None) -> Uki:
    """Read a UKI. ``profile`` is a number as the stub takes it (``@0``), by default the first one if there are any.

    UserError for a damaged file, a profile it has not, or a section that stands twice in one.
    """
    chosen = _sections_of_profile(read_sections(fd), profile)
    initrds = tuple(
        # Microcode goes first: the kernel looks for it at the very start.
        Piece(fd, section.offset, section.size)
        for section in map(chosen.get, (".ucode", ".initrd"))
        if section is not None
    )
    return Uki(initrds, _cmdline(_text(fd, chosen.get(".cmdline"))), _text(fd, chosen.get(".uname")))


def _sections_of_profile(sections: list[Section], profile: int | None) -> dict[str, Section]:
    parts: list[dict[str, Section]] = [{}]
    for section in sections:
        if section.name == ".profile":
            parts.append({})
        elif section.name in parts[-1] and section.name in {".initrd", ".ucode", ".cmdline", ".uname"}:
            raise UserError(f"the section {section.name!r} stands twice in one profile; it may stand there once")
        else:
            parts[-1][section.name] = section
    base, *profiles = parts
    if profile is None and not profiles:
        return base
    number = profile or 0
    if not 0 <= number < len(profiles):
        raise UserError(f"there is no profile @{number}: this image has {len(profiles)}")
    return base | profiles[number]


def _text(fd: int, section: Section | None) -> str | None:
    if section is None:
        return None
    if section.size > _TEXT_LIMIT:
        raise UserError(f"the section {section.name!r} has {section.size} bytes; a text has {_TEXT_LIMIT} at most")
    data = _read(fd, section.offset, section.size, f"its section {section.name!r}")
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape").strip()


def _cmdline(text: str | None) -> str | None:
    """Return what the stub makes of a command line: control characters become spaces, and those at the end go."""
    return None if text is None else text.translate(_CONTROLS).rstrip()


def _read(fd: int, offset: int, length: int, what: str) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) < length:
        raise UserError(f"a damaged PE file: it ends within {what}")
    return data
