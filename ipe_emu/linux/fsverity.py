"""fs-verity's ioctl on a file (include/uapi/linux/fsverity.h)."""

import fcntl
import struct
from typing import Final

# _IOWR('f', 134, struct fsverity_digest), whose size counts without its flexible array.
FS_IOC_MEASURE_VERITY: Final = 0xC0046686
_DIGEST_HEADER: Final = struct.Struct("=HH")
_MAX_DIGEST_SIZE: Final = 64


def measure_verity(fd: int) -> tuple[int, bytes]:
    """Return the algorithm's number and the digest of a sealed file.

    OSError: ENODATA for a file that is not sealed, ENOTTY or EOPNOTSUPP where the file system or the kernel has no
    fs-verity.
    """
    buffer = bytearray(_DIGEST_HEADER.pack(0, _MAX_DIGEST_SIZE) + bytes(_MAX_DIGEST_SIZE))
    fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, buffer)
    algorithm, size = _DIGEST_HEADER.unpack_from(buffer)
    return algorithm, bytes(buffer[_DIGEST_HEADER.size :][:size])
