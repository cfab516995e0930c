"""What execve(2) takes from an ELF file (fs/binfmt_elf.c): its interpreter, and which segments become executable."""

import enum
import os
import struct
from collections.abc import Callable
from typing import Final

from attrs import frozen

from ipe_emu.linux import syscalls

_MAGIC: Final = b"\x7fELF"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
#: A file that is shorter is no ELF file.
HEADER_SIZE: Final = _HEADER.size
_SECTION_HEADER: Final = struct.Struct("<IIQQQQIIQQ")
_THIS_MODULE: Final = b".gnu.linkonce.this_module"
_SHT_NOBITS: Final = 8
# In struct module: after its state and its place in the list of modules.
_MODULE_NAME_OFFSET: Final = 24
#: How long the name of a module is at most, its NUL included (MODULE_NAME_LEN).
MODULE_NAME_SIZE: Final = 56
_CLASS_64: Final = 2
_ET_REL: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
_PT_LOAD: Final = 1
_PT_INTERP: Final = 3
_PF_X: Final = 1
_EM_386: Final = 3
_EM_ARM: Final = 40
_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
# The 32-bit programs that a kernel of each architecture runs as well (CONFIG_IA32_EMULATION, CONFIG_COMPAT).
_COMPAT_MACHINES: Final = {"x86_64": _EM_386, "aarch64": _EM_ARM}
_PATH_MAX: Final = 4096
# the limit of load_elf_phdrs()
_MAX_PROGRAM_HEADERS_SIZE: Final = 65536


class Kind(enum.Enum):
    """What a file is to the kernel's loader of ELF programs."""

    NATIVE = "a program of this architecture"
    COMPAT = "a 32-bit program, which runs here under other system call numbers"
    NOT_ELF = "no ELF program of this architecture"


@frozen
class Program:
    """The program headers of a native ELF file.

    ``executable_segments`` counts the PT_LOAD segments that are mapped from the file with PROT_EXEC: each is one
    question to ``security_mmap_file()``. A segment without content in the file is not mapped from it (``elf_load()``).
    ``interpreter`` is the path in the first PT_INTERP.
    """

    executable_segments: int
    interpreter: bytes | None


class BadElfError(ValueError):
    """An ELF file that the kernel's loader does not take."""


def kind_of(head: bytes) -> Kind:
    """Return what a file is by its beginning, 64 bytes or more (``load_elf_binary()``, ``elf_check_arch()``)."""
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return Kind.NOT_ELF
    ident, type_, machine, *_ = _HEADER.unpack_from(head)
    if type_ not in (_ET_EXEC, _ET_DYN):
        return Kind.NOT_ELF
    if machine == _COMPAT_MACHINES.get(syscalls.MACHINE):
        return Kind.COMPAT
    if machine != _MACHINES.get(syscalls.MACHINE):
        return Kind.NOT_ELF
    # The 64-bit loader does not look at the class; where the compat loader might take such a file, it comes second.
    return Kind.NATIVE if ident[4] == _CLASS_64 else Kind.COMPAT


def read_program(fd: int, head: bytes) -> Program:
    """Read the program headers of a native file; ``head`` is its beginning, of any length from that of a header.

    Raises BadElfError where the kernel gives up.
    """
    _, _, _, _, _, offset, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(head)
    size = count * _PROGRAM_HEADER.size
    if entry_size != _PROGRAM_HEADER.size or not 0 < size <= _MAX_PROGRAM_HEADERS_SIZE:
        raise BadElfError("impossible program headers")
    segments = 0
    interpreter = None
    # They follow the header nearly always, and so are in what was read already.
    table = head[offset : offset + size] if offset + size <= len(head) else _read(fd, size, offset)
    for kind, flags, at, _, _, file_size, *_ in _PROGRAM_HEADER.iter_unpack(table):
        if kind == _PT_LOAD and flags & _PF_X and file_size:
            segments += 1
        elif kind == _PT_INTERP and interpreter is None:
            if not 2 <= file_size <= _PATH_MAX:
                raise BadElfError("an impossible length of the interpreter's path")
            text = _read(fd, file_size, at)
            if text[-1]:
                raise BadElfError("the interpreter's path is not terminated")
            interpreter = text.partition(b"\0")[0]
    return Program(segments, interpreter)


def module_name(read: Callable[[int, int], bytes], size: int) -> bytes | None:
    """Return the name of the kernel module of this machine that ``size`` bytes are; None if they could not be one.

    ``read`` gives the bytes at an offset, so many or fewer. A module is a relocatable file with exactly one section
    ``.gnu.linkonce.this_module`` (kernel: ``elf_validity_cache_copy()``), and its name is the one in that; whether it
    would link with the emulated kernel is not looked at.
    """
    head = read(0, _HEADER.size)
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return None
    ident, type_, machine, _, _, _, sections, _, _, _, _, section_size, count, names = _HEADER.unpack(head)
    if ident[4] != _CLASS_64 or machine != _MACHINES.get(syscalls.MACHINE) or type_ != _ET_REL:
        return None
    if section_size != _SECTION_HEADER.size or names >= count or sections + count * section_size > size:
        return None
    headers = list(_SECTION_HEADER.iter_unpack(read(sections, count * section_size)))
    if len(headers) != count:
        return None
    offset, length = headers[names][4:6]
    if offset + length > size:
        return None
    table = read(offset, length)
    found = [header for header in headers if table[header[0] :].partition(b"\0")[0] == _THIS_MODULE]
    if len(found) != 1:
        return None
    offset, length = found[0][4:6]
    if found[0][1] == _SHT_NOBITS or offset + length > size:
        return None
    return read(offset, length)[_MODULE_NAME_OFFSET:][:MODULE_NAME_SIZE].partition(b"\0")[0]


def _read(fd: int, size: int, offset: int) -> bytes:
    if offset + size >= 1 << 63:
        raise BadElfError("an impossible offset")
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise BadElfError("the file ends early")
    return data
