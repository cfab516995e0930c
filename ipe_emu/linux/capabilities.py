"""Which capabilities a thread has, in its own user namespace (capabilities(7))."""

import ctypes
import struct
from enum import IntEnum
from typing import Final

from ipe_emu.linux import syscalls


class Capability(IntEnum):
    """The capabilities that this project asks about, by their numbers (include/uapi/linux/capability.h)."""

    DAC_OVERRIDE = 1
    SYS_ADMIN = 21
    MAC_ADMIN = 33


_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.Struct("=Ii")
#: Two words of each set, the low one first: effective, permitted, inheritable.
_Sets = ctypes.c_uint32 * 6


def effective(tid: int = 0) -> int:
    """Return a thread's effective set, as a mask of bits ``1 << Capability``; 0 is the calling thread.

    OSError ESRCH if there is no such thread, EPERM where a security module hides its set.
    """
    sets = _Sets()
    syscalls.call("capget", _HEADER.pack(_VERSION_3, tid), sets)
    return sets[0] | sets[3] << 32


def has(capability: Capability) -> bool:
    """Whether the capability is in the calling thread's effective set."""
    return bool(effective() >> capability & 1)
