"""openat2(2): lookups that stay below a root of one's choosing."""

import os
import struct
from typing import Final

from ipe_emu.linux import syscalls

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

_OPEN_HOW: Final = struct.Struct("=QQQ")
_PATH_ONLY: Final = os.O_PATH | os.O_CLOEXEC


def open_path(directory: int, path: bytes, resolve: int) -> int:
    """Return an O_PATH descriptor of what ``path`` names from ``directory``, under the restrictions ``resolve``."""
    how = _OPEN_HOW.pack(_PATH_ONLY, 0, resolve)
    return syscalls.call("openat2", directory, path, how, _OPEN_HOW.size)
