"""statx(2), for what no other call tells of a descriptor of this process: its mount, and whether it is sealed."""

import errno
import struct
from typing import Final

from ipe_emu.linux import syscalls

# struct statx: stx_mask comes first, stx_attributes at 8, stx_mnt_id at 144.
_SIZE: Final = 256
_MNT_ID: Final = 0x1000
_MNT_ID_UNIQUE: Final = 0x4000
_ATTR_VERITY: Final = 0x00100000
_AT_STATX_DONT_SYNC: Final = 0x4000
_MASK: Final = struct.Struct("=I")
_NUMBER: Final = struct.Struct("=Q")
_ATTRIBUTES: Final = 8
_OFFSET: Final = 144


def mount_id(fd: int) -> int:
    """Return the id of the mount that a descriptor lies on, as mountinfo has it. OSError ENOSYS before Linux 5.8."""
    found = _mount(fd, _MNT_ID)
    if found is None:
        raise OSError(errno.ENOSYS, "statx(2) does not tell mounts before Linux 5.8")
    return found


def unique_mount_id(fd: int) -> int | None:
    """Return the number of that mount which no other will ever have; None before Linux 6.8."""
    return _mount(fd, _MNT_ID_UNIQUE)


def is_sealed(fd: int) -> bool:
    """Whether fs-verity seals a file; of one on an overlay, the layer's that has its status (``ovl_getattr()``)."""
    buffer = syscalls.writable(_SIZE)
    syscalls.call("statx", fd, b"", syscalls.AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, buffer)
    attributes: int = _NUMBER.unpack_from(buffer, _ATTRIBUTES)[0]
    return bool(attributes & _ATTR_VERITY)


def _mount(fd: int, which: int) -> int | None:
    buffer = syscalls.writable(_SIZE)
    syscalls.call("statx", fd, b"", syscalls.AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, which, buffer)
    if not _MASK.unpack_from(buffer)[0] & which:
        return None
    number: int = _NUMBER.unpack_from(buffer, _OFFSET)[0]
    return number
