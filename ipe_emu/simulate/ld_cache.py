"""/etc/ld.so.cache, which ldconfig(8) writes and glibc's dynamic linker reads (glibc: sysdeps/generic/dl-cache.h)."""

import struct
from collections.abc import Mapping
from typing import Final

from ipe_emu.errors import NotJudgedError
from ipe_emu.linux import syscalls

#: A longer file is no cache: one for 16,000 libraries is shorter.
MAX_SIZE: Final = 1 << 20
_MAX_STRING: Final = 1024
_MAGIC: Final = b"glibc-ld.so.cache1.1"
_HEADER: Final = struct.Struct("<20sIIB3xI12x")
_ENTRY: Final = struct.Struct("<iIIIQ")
# FLAG_ELF_LIBC6 with FLAG_X8664_LIB64 or FLAG_AARCH64_LIB64, for this architecture's 64-bit programs; and FLAG_ELF.
_FLAGS: Final = {"x86_64": (0x0303, 1), "aarch64": (0x0A03, 1)}
_BIG_ENDIAN: Final = 3
_ENDIAN_MASK: Final = 3


def read_cache(data: bytes) -> Mapping[bytes, tuple[bytes, ...]]:
    """Return the paths that the cache has for each name, those for any CPU and those for better ones alike.

    NotJudgedError for a cache in the format before glibc 2.32, or a damaged one: what a dynamic linker makes of it
    depends on its version.
    """
    if not data.startswith(_MAGIC) or len(data) < _HEADER.size:
        raise NotJudgedError("/etc/ld.so.cache is not in the format of glibc 2.32 and newer: run ldconfig -r")
    _, count, _, flags, _ = _HEADER.unpack_from(data)
    if flags & _ENDIAN_MASK == _BIG_ENDIAN or _HEADER.size + count * _ENTRY.size > len(data):
        raise NotJudgedError("/etc/ld.so.cache is damaged, or of another machine")
    accepted = _FLAGS[syscalls.MACHINE]
    found: dict[bytes, list[bytes]] = {}
    for at in range(_HEADER.size, _HEADER.size + count * _ENTRY.size, _ENTRY.size):
        kind, key, value, _, _ = _ENTRY.unpack_from(data, at)
        if kind in accepted:
            paths = found.setdefault(_string(data, key), [])
            path = _string(data, value)
            if path not in paths:
                paths.append(path)
    return {name: tuple(paths) for name, paths in found.items()}


def _string(data: bytes, at: int) -> bytes:
    end = data.find(b"\0", at, at + _MAX_STRING)
    if end < 0:
        raise NotJudgedError("/etc/ld.so.cache is damaged: a string has no end")
    return data[at:end]
