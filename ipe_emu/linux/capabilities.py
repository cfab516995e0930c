"""Capabilities of this process (capabilities(7)): which it has, in its own user namespace."""

import struct
from enum import IntEnum
from typing import Final

from ipe_emu.linux import syscalls


class Capability(IntEnum):
    """The capabilities that this project asks about, by their numbers (include/uapi/linux/capability.h)."""

    SYS_ADMIN = 21
    MAC_ADMIN = 33


_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.Struct("=Ii")
#: Two words of each set, the low one first: effective, permitted, inheritable.
_DATA: Final = struct.Struct("=6I")


def effective() -> int:
    """Return the calling thread's effective set, as a mask of bits ``1 << Capability``."""
    data = syscalls.writable(_DATA.size)
    syscalls.call("capget", _HEADER.pack(_VERSION_3, 0), data)
    low, _, _, high, _, _ = _DATA.unpack(data.raw)
    return int(low | high << 32)


def has(capability: Capability) -> bool:
    """Whether the capability is in the calling thread's effective set."""
    return bool(effective() >> capability & 1)
