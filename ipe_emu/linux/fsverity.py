"""fs-verity's ioctls on a file, and its flag among a file's (include/uapi/linux/fsverity.h, linux/fs.h)."""

import errno
import fcntl
import struct
from pathlib import Path
from typing import Final

from ipe_emu.linux import syscalls

# _IOW('f', 133, struct fsverity_enable_arg), _IOWR('f', 134, struct fsverity_digest), whose size counts without its
# flexible array, and _IOWR('f', 135, struct fsverity_read_metadata_arg).
FS_IOC_ENABLE_VERITY: Final = 0x40806685
FS_IOC_MEASURE_VERITY: Final = 0xC0046686
FS_IOC_READ_VERITY_METADATA: Final = 0xC0286687
#: _IOR('f', 1, long), though it is an int that is written.
FS_IOC_GETFLAGS: Final = 0x80086601

_FILE_SYSTEMS: Final = Path("/sys/fs")
_SYSCTLS: Final = Path("/proc/sys/fs/verity")

FS_IMMUTABLE_FL: Final = 0x10
FS_APPEND_FL: Final = 0x20
FS_VERITY_FL: Final = 0x100000

METADATA_MERKLE_TREE: Final = 1
METADATA_DESCRIPTOR: Final = 2
METADATA_SIGNATURE: Final = 3

#: struct fsverity_digest without the digest: the algorithm's number, and the digest's size in bytes.
DIGEST_HEADER: Final = struct.Struct("=HH")
#: struct fsverity_read_metadata_arg: metadata_type, offset, length, buf_ptr, __reserved.
READ_METADATA_ARG: Final = struct.Struct("=QQQQQ")
_MAX_DIGEST_SIZE: Final = 64
_INT: Final = struct.Struct("=i")


def may_have_seals() -> bool:
    """Whether a file system of this machine may have sealed files: False only where that is certain.

    The file systems that can have them say so if the kernel has fs-verity, as soon as the first of them is mounted.
    """
    try:
        names = {entry.name for entry in _FILE_SYSTEMS.iterdir()}
    except OSError:
        return True
    return _SYSCTLS.exists() or any((_FILE_SYSTEMS / name / "features" / "verity").exists() for name in names)


def measure_verity(fd: int) -> tuple[int, bytes]:
    """Return the algorithm's number and the digest of a sealed file.

    OSError: ENODATA for a file that is not sealed, ENOTTY or EOPNOTSUPP where the file system or the kernel has no
    fs-verity.
    """
    buffer = bytearray(DIGEST_HEADER.pack(0, _MAX_DIGEST_SIZE) + bytes(_MAX_DIGEST_SIZE))
    fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, buffer)
    algorithm, size = DIGEST_HEADER.unpack_from(buffer)
    return algorithm, bytes(buffer[DIGEST_HEADER.size :][:size])


def read_signature(fd: int, limit: int) -> bytes:
    """Return the builtin signature of a sealed file, at most ``limit`` bytes; nothing if it has none.

    OSError ENODATA for a file that is not sealed is not told from that; otherwise as ``measure_verity``.
    """
    data = syscalls.writable(limit)
    arg = READ_METADATA_ARG.pack(METADATA_SIGNATURE, 0, limit, syscalls.address(data), 0)
    try:
        size = syscalls.call("ioctl", fd, FS_IOC_READ_VERITY_METADATA, arg)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return b""
        raise
    return data.raw[:size]


def flags_of(fd: int) -> int:
    """Return the flags of a file (FS_VERITY_FL and its like, ioctl_iflags(2)); none where its file system has none."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return 0
        raise
    flags: int = _INT.unpack_from(buffer)[0]
    return flags


def is_supported() -> bool:
    """Whether this machine's kernel was built with fs-verity, for the file systems that can have it."""
    return Path("/proc/sys/fs/verity").is_dir()
