"""finit_module(2) and init_module(2): op=KMODULE. Nothing is ever loaded."""

import errno
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from typing import Final

from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook import elf
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Answer, Event, Fail, Plan, Refuse, Return
from ipe_emu.linux.syscalls import signed_int
from ipe_emu.policy.rule import Operation

_CAP_SYS_MODULE: Final = 16
_IGNORE_MODVERSIONS: Final = 1
_IGNORE_VERMAGIC: Final = 2
_COMPRESSED_FILE: Final = 4
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# More than any module unpacks to.
_UNPACKED_LIMIT: Final = 256 << 20


def plan_finit_module(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan finit_module(fd, parameters, flags): KERNEL_READ of the file.

    A compressed module is op=KMODULE too: 6.12 reads it under the same id, 7.3 under one that IPE treats alike.
    """
    _may_init_module(caller)
    flags = signed_int(args[2])
    if flags & ~(_IGNORE_MODVERSIONS | _IGNORE_VERMAGIC | _COMPRESSED_FILE):
        raise KernelError(errno.EINVAL, "unknown flags", "finit_module")
    fd, event = kernel_read_file(caller, signed_int(args[0]), Operation.KMODULE)
    return Plan(_outcome_of_file(caller, fd, event, compressed=bool(flags & _COMPRESSED_FILE)), (event,))


def plan_init_module(caller: Caller, args: tuple[int, ...]) -> Plan:
    """Plan init_module(image, length, parameters): KERNEL_LOAD without a file (``copy_module_from_user()``)."""
    _may_init_module(caller)
    address, length = args[:2]
    if length > _UNPACKED_LIMIT:
        raise KernelError(errno.ENOMEM, "larger than any module", "copy_module_from_user")
    if length < elf.HEADER_SIZE:
        raise KernelError(errno.ENOEXEC, "shorter than an ELF header", "copy_module_from_user")
    event = Event(Operation.KMODULE, Hook.KERNEL_LOAD, caller.subject, None)
    try:
        image = caller.tracee.memory(address, length)
    except OSError:
        image = b""
    if len(image) < length:
        unreadable = KernelError(errno.EFAULT, "the module cannot be read", "copy_chunked_from_user")
        return Plan(Fail(unreadable), (event,))
    return Plan(_outcome(_reader(image), length, "a module from memory"), (event,))


def kernel_read_file(caller: Caller, number: int, operation: Operation) -> tuple[int, Event]:
    """Return our descriptor of the file that the kernel reads from a caller's ``number``, and the question it asks.

    Raises KernelError as ``kernel_read_file_from_fd()``: EBADF if it is not open for reading, EINVAL if it is not a
    regular file. What the file holds is looked at after the question only.
    """
    fd = caller.descriptor(number)
    if fd is None or not caller.may_read(number):
        raise KernelError(errno.EBADF, f"descriptor {number} is not open for reading", "kernel_read_file_from_fd")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise KernelError(errno.EINVAL, "no regular file", "kernel_read_file")
    return fd, Event(operation, Hook.KERNEL_READ, caller.subject, caller.file(fd))


def _may_init_module(caller: Caller) -> None:
    if not caller.capable(_CAP_SYS_MODULE):
        raise KernelError(errno.EPERM, "CAP_SYS_MODULE is missing", "may_init_module")


def _outcome_of_file(caller: Caller, fd: int, event: Event, *, compressed: bool) -> Answer:
    name = os.fsdecode(event.file.path) if event.file else "?"
    size = os.fstat(fd).st_size
    if not size:
        return Fail(KernelError(errno.EINVAL, "an empty file", "kernel_read_file"))
    content = caller.readable(fd)
    if not compressed:
        return _outcome(lambda offset, length: os.pread(content, length, offset), size, name)
    if os.pread(content, len(_ZSTD_MAGIC), 0) == _ZSTD_MAGIC:
        return Refuse(f"{name} is compressed by zstd, which cannot be unpacked here to see whether it is a module")
    unpacked = _unpack(content, size)
    if unpacked is None:
        return Fail(KernelError(errno.EINVAL, "not compressed in a way the kernel knows", "module_decompress"))
    return _outcome(_reader(unpacked), len(unpacked), name)


def _unpack(fd: int, size: int) -> bytes | None:
    data = os.pread(fd, size, 0)
    unpacker = zlib.decompressobj(wbits=31) if data.startswith(_GZIP_MAGIC) else lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        unpacked = unpacker.decompress(data, _UNPACKED_LIMIT)
    except (zlib.error, lzma.LZMAError):
        return None
    return unpacked if unpacker.eof else None


def _reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: image[offset : offset + length]


def _outcome(read: Callable[[int, int], bytes], size: int, name: str) -> Answer:
    if not elf.is_module(read, size):
        return Fail(KernelError(errno.ENOEXEC, "no kernel module of this machine", "elf_validity_cache_copy"))
    return Return(0, f"{name} was not loaded: a kernel would load it now, or refuse it for its own reasons")
