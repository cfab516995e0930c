"""finit_module(2) and init_module(2): op=KMODULE; and delete_module(2), which must see what they did."""

import errno
import functools
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from typing import Final

from ipe_emu.binfmt import elf
from ipe_emu.errors import KernelError
from ipe_emu.event import Hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Answer, Event, Fail, Plan, Refuse, Return
from ipe_emu.exec_hook.write_access import deny_write_access
from ipe_emu.linux.syscalls import signed_int
from ipe_emu.policy.rule import Operation

_CAP_SYS_MODULE: Final = 16
_IGNORE_MODVERSIONS: Final = 1
_IGNORE_VERMAGIC: Final = 2
_COMPRESSED_FILE: Final = 4
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# INT_MAX
_LARGEST_FILE: Final = (1 << 31) - 1
# More than any module unpacks to.
_UNPACKED_LIMIT: Final = 256 << 20


class Modules:
    """The modules of the rehearsed machine: those that it would have loaded, by name. None is ever loaded."""

    def __init__(self) -> None:
        self._loaded: dict[bytes, int] = {}

    def listing(self) -> bytes:
        """Return what /proc/modules shows, newest first (``m_show()``): none is in use, and all lie nowhere."""
        return b"".join(b"%s %d 0 - Live 0x0000000000000000\n" % item for item in reversed([*self._loaded.items()]))

    def plan_finit_module(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        """Plan finit_module(fd, parameters, flags): KERNEL_READ of the file.

        A compressed module is op=KMODULE too: 6.12 reads it under the same id, 7.3 under one that IPE treats alike.
        """
        _may_init_module(caller)
        flags = signed_int(args[2])
        if flags & ~(_IGNORE_MODVERSIONS | _IGNORE_VERMAGIC | _COMPRESSED_FILE):
            raise KernelError(errno.EINVAL, "unknown flags", "finit_module")
        content, event = kernel_read_file(caller, signed_int(args[0]), Operation.KMODULE, _LARGEST_FILE)
        return Plan(self._outcome_of_file(content, event, compressed=bool(flags & _COMPRESSED_FILE)), (event,))

    def plan_init_module(self, caller: Caller, args: tuple[int, ...]) -> Plan:
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
        return Plan(self._outcome(_reader(image), length, "a module from memory"), (event,))

    def plan_delete_module(self, caller: Caller, args: tuple[int, ...]) -> Plan:
        """Plan delete_module(name, flags): only what would be loaded is there to be deleted."""
        _may_init_module(caller)
        try:
            name = caller.tracee.string(args[0], elf.MODULE_NAME_SIZE)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise KernelError(errno.EFAULT, "the name cannot be read", "delete_module") from None
        if name is None or name not in self._loaded:
            raise KernelError(errno.ENOENT, "no such module was loaded here", "find_module")
        return Plan(Return(0, then=functools.partial(self._loaded.__delitem__, name)))

    def _outcome_of_file(self, content: int, event: Event, *, compressed: bool) -> Answer:
        name = os.fsdecode(event.file.path) if event.file else "?"
        size = os.fstat(content).st_size
        if not compressed:
            return self._outcome(lambda offset, length: os.pread(content, length, offset), size, name)
        if os.pread(content, len(_ZSTD_MAGIC), 0) == _ZSTD_MAGIC:
            return Refuse(f"{name} is compressed by zstd, which cannot be unpacked here to see whether it is a module")
        unpacked = _unpack(content, size)
        if unpacked is None:
            return Fail(KernelError(errno.EINVAL, "not compressed in a way the kernel knows", "module_decompress"))
        return self._outcome(_reader(unpacked), len(unpacked), name)

    def _outcome(self, read: Callable[[int, int], bytes], size: int, shown: str) -> Answer:
        name = elf.module_name(read, size)
        if name is None:
            return Fail(KernelError(errno.ENOEXEC, "no kernel module of this machine", "elf_validity_cache_copy"))
        if name in self._loaded:
            return Fail(KernelError(errno.EEXIST, "a module of this name was loaded before", "add_unformed_module"))
        return Return(
            0,
            f"{shown} was not loaded: a kernel would load it now, or refuse it for its own reasons",
            then=functools.partial(self._loaded.__setitem__, name, size),
        )


def kernel_read_file(caller: Caller, number: int, operation: Operation, limit: int) -> tuple[int, Event]:
    """Return a descriptor of the file that the kernel reads from a caller's ``number``, and the question it asks.

    Raises KernelError as ``kernel_read_file_from_fd()``, which asks last: EBADF if it is not open for reading, EINVAL
    if it is no regular file, ETXTBSY if somebody can write to it, EINVAL if it is empty, EFBIG if it is longer than
    ``limit``. What the file holds is looked at after the question only.
    """
    fd = caller.descriptor(number)
    if fd is None or not caller.may_read(number):
        raise KernelError(errno.EBADF, f"descriptor {number} is not open for reading", "kernel_read_file_from_fd")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise KernelError(errno.EINVAL, "no regular file", "kernel_read_file")
    content = caller.readable(fd)
    deny_write_access(content, certain=True)
    size = os.fstat(content).st_size
    if not size:
        raise KernelError(errno.EINVAL, "an empty file", "kernel_read_file")
    if size > limit:
        raise KernelError(errno.EFBIG, "a file of impossible length", "kernel_read_file")
    return content, Event(operation, Hook.KERNEL_READ, caller.subject, caller.file(fd))


def _may_init_module(caller: Caller) -> None:
    if not caller.capable(_CAP_SYS_MODULE):
        raise KernelError(errno.EPERM, "CAP_SYS_MODULE is missing", "may_init_module")


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
