"""What execve(2) takes from an ELF file (fs/binfmt_elf.c): its interpreter, and which segments become executable."""

import enum
import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Final

from attrs import frozen

from ipe_emu.errors import KernelError
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
_CLASS_32: Final = 1
_ET_REL: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
_PROGRAM_TYPES: Final = (_ET_EXEC, _ET_DYN)
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
    """What the kernel's loader does with a native ELF file.

    ``executable_segments`` counts the PT_LOAD segments that it maps from the file with PROT_EXEC: each is one question
    to ``security_mmap_file()``. A segment without content in the file is not mapped from it (``elf_load()``).
    ``complete`` is false if it gives up before the end of that. ``interpreter`` is the path in the first PT_INTERP.
    """

    executable_segments: int
    complete: bool
    interpreter: bytes | None = None


class BadElfError(ValueError):
    """An ELF file that the kernel's loader does not take."""


def kind_of(head: bytes) -> Kind:
    """Return what a file is by its beginning, 64 bytes or more (``load_elf_binary()``, ``elf_check_arch()``)."""
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return Kind.NOT_ELF
    ident, type_, machine, *_ = _HEADER.unpack_from(head)
    if type_ not in _PROGRAM_TYPES:
        return Kind.NOT_ELF
    if machine == _COMPAT_MACHINES.get(syscalls.MACHINE):
        return Kind.COMPAT
    if machine != _MACHINES.get(syscalls.MACHINE):
        return Kind.NOT_ELF
    # The 64-bit loader does not look at the class. It gives up only where the program headers are not where they would
    # be, as in a file for x32, which another loader then takes.
    return Kind.COMPAT if ident[4] == _CLASS_32 else Kind.NATIVE


def is_of_another_machine(head: bytes) -> bool:
    """Whether a file is for another architecture than this one, by its beginning; all the same whether it is sound."""
    return head.startswith(_MAGIC) and len(head) >= _HEADER.size and _machine(head) != _MACHINES.get(syscalls.MACHINE)


def _machine(head: bytes) -> int:
    machine: int = _HEADER.unpack_from(head)[2]
    return machine


def read_program(fd: int, head: bytes) -> Program:
    """Read a native program; ``head`` is its beginning, of any length from that of a header.

    Raises BadElfError where the kernel takes it for none of its own, and KernelError where it fails otherwise, both
    before the point of no return.
    """
    headers = program_headers(fd, head)
    interpreter = None
    for kind, _, at, _, _, file_size, *_ in headers:
        if kind == _PT_INTERP:
            if not 2 <= file_size <= _PATH_MAX:
                raise BadElfError("an impossible length of the interpreter's path")
            text = _read(fd, file_size, at)
            if text[-1]:
                raise BadElfError("the interpreter's path is not terminated")
            interpreter = text.partition(b"\0")[0]
            break
    segments, complete = _load(headers)
    return Program(segments, complete, interpreter)


def read_interpreter(fd: int, head: bytes) -> Program:
    """Read what a native program names as its ELF interpreter. Raises BadElfError where it can be none.

    What its type is the kernel sees only when it loads it, too late to return an error (``load_elf_interp()``).
    """
    if not head.startswith(_MAGIC):
        raise BadElfError("no ELF file")
    _, type_, machine, *_ = _HEADER.unpack_from(head)
    if machine != _MACHINES.get(syscalls.MACHINE):
        raise BadElfError("of another machine")
    headers = program_headers(fd, head)
    if type_ not in _PROGRAM_TYPES:
        return Program(0, complete=False)
    return Program(*_load(headers))


def _load(headers: Sequence[tuple[int, ...]]) -> tuple[int, bool]:
    """Return how many segments are mapped with PROT_EXEC, and whether the loader comes to the end."""
    segments = 0
    for kind, flags, at, address, _, file_size, memory_size, _ in headers:
        if kind == _PT_LOAD:
            if file_size:
                if (at - address) % mmap.PAGESIZE:  # vm_mmap() refuses such an offset before it asks
                    return segments, False
                segments += bool(flags & _PF_X)
            if file_size > memory_size:
                return segments, False
    return segments, True


def program_headers(fd: int, head: bytes) -> list[tuple[int, ...]]:
    """Return the program headers, each as type, flags, offset, address, physical address, sizes and alignment.

    ``head`` is the beginning of the file, of any length from that of a header. BadElfError where they are impossible.
    """
    _, _, _, _, _, offset, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(head)
    size = count * _PROGRAM_HEADER.size
    if entry_size != _PROGRAM_HEADER.size or not 0 < size <= _MAX_PROGRAM_HEADERS_SIZE:
        raise BadElfError("impossible program headers")
    # They follow the header nearly always, and so are in what was read already.
    if offset + size <= len(head):
        return list(_PROGRAM_HEADER.iter_unpack(head[offset : offset + size]))
    try:
        return list(_PROGRAM_HEADER.iter_unpack(_read(fd, size, offset)))
    except KernelError as error:
        raise BadElfError(error.reason) from None


def module_name(read: Callable[[int, int], bytes], size: int) -> bytes | None:
    """Return the name of the kernel module of this machine that ``size`` bytes are; None if they could not be one.

    ``read`` gives the bytes at an offset, so many or fewer. A module is a relocatable file with exactly one section
    ``.gnu.linkonce.this_module`` (kernel: ``elf_validity_cache_copy()``), and its name is the one in that; whether it
    would link with the emulated kernel is not looked at.
    """
    head = read(0, _HEADER.size)
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return None
    _, type_, machine, _, _, _, sections, _, _, _, _, section_size, count, names = _HEADER.unpack(head)
    if machine != _MACHINES.get(syscalls.MACHINE) or type_ != _ET_REL:
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
    # Ended by a NUL, or by the table's end. No more is copied: a hostile file has many headers and long tables.
    names_it = (_THIS_MODULE + b"\0", _THIS_MODULE)
    found = [header for header in headers if table[header[0] : header[0] + len(_THIS_MODULE) + 1] in names_it]
    if len(found) != 1:
        return None
    offset, length = found[0][4:6]
    if found[0][1] == _SHT_NOBITS or offset + length > size:
        return None
    return read(offset, length)[_MODULE_NAME_OFFSET:][:MODULE_NAME_SIZE].partition(b"\0")[0]


def kernel_read(fd: int, size: int, offset: int) -> bytes:
    """Read as the kernel does for itself (``kernel_read()``): KernelError where the file system answers an error."""
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "its file system cannot read it", "kernel_read") from None


def _read(fd: int, size: int, offset: int) -> bytes:
    if offset + size >= 1 << 63:
        raise KernelError(errno.EINVAL, "an impossible offset", "rw_verify_area")
    data = kernel_read(fd, size, offset)
    if len(data) != size:
        raise KernelError(errno.EIO, "the file ends early", "elf_read")
    return data
