"""What a dynamic linker takes from an ELF file: the libraries it needs, and where they are looked for (elf(5))."""

import os
import struct
from collections.abc import Sequence
from typing import Final

from attrs import frozen

from ipe_emu.binfmt.elf import BadElfError, program_headers

_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_PT_INTERP: Final = 3
_PT_GNU_STACK: Final = 0x6474E551
_PF_X: Final = 1

_ENTRY: Final = struct.Struct("<qQ")
_DT_NULL: Final = 0
_DT_NEEDED: Final = 1
_DT_STRTAB: Final = 5
_DT_SONAME: Final = 14
_DT_RPATH: Final = 15
_DT_RUNPATH: Final = 29
_DT_FLAGS_1: Final = 0x6FFFFFFB
_DT_FILTER: Final = 0x7FFFFFFF
_DF_1_NODEFLIB: Final = 0x800
_DF_1_PIE: Final = 0x08000000
# Real ones have some dozens of entries of 16 bytes; a larger one is not believed.
_MAX_SIZE: Final = 1 << 16
_MAX_STRING: Final = 4096
#: Real ones need some hundred libraries at most, by short names.
_MAX_NEEDED: Final = 1024
_MAX_STRINGS: Final = 1 << 16


@frozen
class Dynamic:
    """The dynamic section, as far as it says which files are mapped beside this one.

    ``stack`` is whether it asks for an executable stack, None where it says nothing of it. ``soname`` is None for what
    no library is called. ``is_program`` is whether it says to be an executable; old static-pie ones do not.
    """

    needed: tuple[bytes, ...] = ()
    soname: bytes | None = None
    rpath: bytes | None = None
    runpath: bytes | None = None
    no_default_directories: bool = False
    has_filter: bool = False
    is_program: bool = False
    has_interpreter: bool = False
    is_dynamic: bool = False
    stack: bool | None = None


def read_dynamic(fd: int, head: bytes) -> Dynamic:
    """Read it from a native 64-bit file; ``head`` is its beginning, 64 bytes or more.

    BadElfError for what cannot be read as the headers promise; OSError as pread(2). What is read is bounded.
    """
    headers = program_headers(fd, head)
    stack = next((bool(h[1] & _PF_X) for h in headers if h[0] == _PT_GNU_STACK), None)
    interpreter = any(h[0] == _PT_INTERP for h in headers)
    section = next((h for h in headers if h[0] == _PT_DYNAMIC), None)
    if section is None:
        return Dynamic(has_interpreter=interpreter, stack=stack)
    entries = _entries(fd, section)
    values = dict(reversed(entries))  # the first of each counts
    strings = None if _DT_STRTAB not in values else _file_offset(headers, values[_DT_STRTAB])

    def string(tag: int) -> bytes | None:
        return _string(fd, strings, values[tag]) if tag in values else None

    flags = values.get(_DT_FLAGS_1, 0)
    needed = [value for tag, value in entries if tag == _DT_NEEDED]
    if len(needed) > _MAX_NEEDED:
        raise BadElfError(f"it needs {len(needed)} libraries")
    names = tuple(_string(fd, strings, value) for value in needed)
    if sum(map(len, names)) > _MAX_STRINGS:
        raise BadElfError("names of libraries as long as no real ones")
    return Dynamic(
        needed=names,
        soname=string(_DT_SONAME),
        rpath=string(_DT_RPATH),
        runpath=string(_DT_RUNPATH),
        no_default_directories=bool(flags & _DF_1_NODEFLIB),
        has_filter=_DT_FILTER in values,
        is_program=bool(flags & _DF_1_PIE),
        has_interpreter=interpreter,
        is_dynamic=True,
        stack=stack,
    )


def _entries(fd: int, section: tuple[int, ...]) -> list[tuple[int, int]]:
    offset, size = section[2], section[5]
    if size > _MAX_SIZE or offset >= 1 << 62:
        raise BadElfError("an impossible dynamic section")
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise BadElfError("the dynamic section lies beyond the end of the file")
    found: list[tuple[int, int]] = []
    for tag, value in _ENTRY.iter_unpack(data[: size - size % _ENTRY.size]):
        if tag == _DT_NULL:
            break
        found.append((tag, value))
    return found


def _file_offset(headers: Sequence[tuple[int, ...]], address: int) -> int:
    """Return where in the file the segments have what they map at an address."""
    for kind, _, offset, start, _, file_size, *_ in headers:
        if kind == _PT_LOAD and start <= address < start + file_size:
            return offset + address - start
    raise BadElfError("the dynamic section points out of the file")


def _string(fd: int, strings: int | None, at: int) -> bytes:
    if strings is None or strings + at >= 1 << 62:
        raise BadElfError("the dynamic section names a string and has none")
    text, end, _ = os.pread(fd, _MAX_STRING, strings + at).partition(b"\0")
    if not end:
        raise BadElfError("a string of the dynamic section has no end")
    return text
