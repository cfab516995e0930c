"""struct stat and struct statx, as system calls write them: for calls that are answered without being carried out."""

import struct
from typing import Final

from attrs import frozen

from ipe_emu.linux import syscalls

# x86_64 (arch/x86/include/uapi/asm/stat.h): dev, ino, nlink, mode, uid, gid, padding, rdev, size, blksize, blocks,
# three times of seconds and nanoseconds, padding.
_STAT_X86_64: Final = struct.Struct("=QQQIIIIQqqq6q24x")
# The generic one: dev, ino, mode, nlink, uid, gid, rdev, padding, size, blksize, padding, blocks, times, padding.
_STAT_GENERIC: Final = struct.Struct("=QQIIIIQQqiiq6q8x")
# mask, blksize, attributes, nlink, uid, gid, mode, padding, ino, size, blocks, attributes' mask, four times of seconds,
# nanoseconds and padding (atime, btime, ctime, mtime), rdev and dev as major and minor, mount, and what is not set.
_STATX: Final = struct.Struct("=IIQIIIHHQQQQ" + "qIi" * 4 + "IIIIQ" + "104x")
_STATX_BASIC: Final = 0x7FF
_NANOSECONDS: Final = 1_000_000_000


@frozen
class FileStatus:
    """What fstat(2) says of a file; times are nanoseconds."""

    dev: int
    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    size: int = 0
    blocks: int = 0

    def stat(self) -> bytes:
        """Return a ``struct stat`` of this machine's architecture."""
        times = [part for ns in (self.atime_ns, self.mtime_ns, self.ctime_ns) for part in divmod(ns, _NANOSECONDS)]
        if syscalls.MACHINE == "x86_64":
            return _STAT_X86_64.pack(
                self.dev, self.ino, self.nlink, self.mode, self.uid, self.gid, 0, self.rdev, self.size, self.blksize,
                self.blocks, *times,
            )  # fmt: skip
        return _STAT_GENERIC.pack(
            self.dev, self.ino, self.mode, self.nlink, self.uid, self.gid, self.rdev, 0, self.size, self.blksize, 0,
            self.blocks, *times,
        )  # fmt: skip

    def statx(self) -> bytes:
        """Return a ``struct statx`` with the basic fields."""
        times: list[int] = []
        for ns in (self.atime_ns, 0, self.ctime_ns, self.mtime_ns):
            times += [*divmod(ns, _NANOSECONDS), 0]
        return _STATX.pack(
            _STATX_BASIC, self.blksize, 0, self.nlink, self.uid, self.gid, self.mode, 0, self.ino, self.size,
            self.blocks, 0, *times, *_halves(self.rdev), *_halves(self.dev), 0,
        )  # fmt: skip


def _halves(number: int) -> tuple[int, int]:
    """Return major and minor of a device number as stat(2) encodes it."""
    return number >> 8 & 0xFFF | number >> 32 & ~0xFFF, number & 0xFF | number >> 12 & ~0xFF
