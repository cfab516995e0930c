"""Which file system an image holds, and whether a kernel would mount it, from its superblock."""

import enum
import errno
import struct
from collections.abc import Callable
from typing import Final

from ipe_emu.errors import KernelError, UserError
from ipe_emu.volumes.crc32c import crc32c

#: Returns up to so many bytes from an offset on, fewer only at the end of the image.
Read = Callable[[int, int], bytes]


class Kind(enum.Enum):
    """A file system that can be mounted; the value is its name for mount(8)."""

    SQUASHFS = "squashfs"
    EXT4 = "ext4"
    EROFS = "erofs"


_HEAD: Final = 4096
# Where each one's magic number lies.
_MAGIC: Final = {Kind.SQUASHFS: (0, b"hsqs"), Kind.EROFS: (1024, b"\xe2\xe1\xf5\xe0"), Kind.EXT4: (1080, b"\x53\xef")}
# What else people have in images, for the message alone.
_OTHERS: Final = (
    (0, b"XFSB", "XFS"),
    (65600, b"_BHRfS_M", "Btrfs"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (32769, b"CD001", "ISO 9660"),
    (0, b"\x45\x3d\xcd\x28", "cramfs"),
    (0, b"-rom1fs-", "romfs"),
    (0, b"sqsh", "squashfs of the other byte order"),
    (0, b"LUKS\xba\xbe", "LUKS, which is encrypted"),
    (0, b"verity\0\0", "a hash tree of dm-verity, without data"),
    (0, b"070701", "a cpio archive"),
    (0, b"\x1f\x8b", "data compressed by gzip"),
    (0, b"\x28\xb5\x2f\xfd", "data compressed by zstd"),
    (0, b"\xfd7zXZ\0", "data compressed by xz"),
    (0, b"\x7fELF", "a program"),
    (512, b"EFI PART", "a disk with partitions (GPT)"),
    (510, b"\x55\xaa", "a disk with partitions, or FAT"),
)

# struct squashfs_super_block: s_major at 28, bytes_used at 40.
_SQUASHFS_VERSION: Final = struct.Struct("<28xHH")
_SQUASHFS_BYTES_USED: Final = struct.Struct("<40xq")
# struct ext4_super_block, which is at byte 1024.
_EXT4: Final = struct.Struct("<4xI16xI68xI")
_EXT4_BLOCKS_HIGH: Final = struct.Struct("<336xI")
# struct erofs_super_block, which is at byte 1024: magic, checksum, feature_compat, blkszbits, sb_extslots.
_EROFS: Final = struct.Struct("<4xIIBB")
_EROFS_HAS_CHECKSUM: Final = 0x1
_EROFS_MOST_SLOTS: Final = (_HEAD - 1024 - 128) // 16
_PAGE_BITS: Final = 12
_EXT4_NEEDS_RECOVERY: Final = 0x4
_EXT4_64BIT: Final = 0x80


def recognise(read: Read, size: int) -> Kind:
    """Return what the image holds. UserError names what it holds instead; KernelError where it cannot be read."""
    head = read(0, _HEAD)
    for kind, (offset, magic) in _MAGIC.items():
        if head[offset : offset + len(magic)] == magic:
            return kind
    raise UserError(f"holds no squashfs, ext4 or erofs file system, but {_what_else(read, head, size)}")


def _what_else(read: Read, head: bytes, size: int) -> str:
    for offset, magic, name in _OTHERS:
        found = read(offset, len(magic)) if offset >= len(head) else head[offset : offset + len(magic)]
        if found == magic:
            return name
    if not any(head):
        return f"{'nothing but' if size <= len(head) else 'at its beginning'} zeros"
    return f"something that begins with {head[:8].hex()} and has {head[1080:1082].hex()} at byte 1080"


def check_mountable(kind: Kind, read: Read, size: int, logical_block_size: int) -> None:
    """Raise KernelError where a kernel would refuse to mount the image read-only, and a helper program might not.

    ``logical_block_size`` is that of the device, which a file system's blocks cannot fall below: for dm-verity the size
    of a data block (``verity_io_hints()``).
    """
    head = read(0, _HEAD)
    if len(head) < _HEAD:
        raise KernelError(errno.EINVAL, f"the image has {len(head)} bytes, too few for a file system", "sb_bread")
    if kind is Kind.SQUASHFS:
        _check_squashfs(head, size)
    elif kind is Kind.EXT4:
        _check_ext4(head[1024:], size, logical_block_size)
    else:
        _check_erofs(head[1024:], logical_block_size)


def _check_block_size(size: int, logical: int, function: str) -> None:
    if not max(512, logical) <= size <= 1 << _PAGE_BITS:
        raise KernelError(
            errno.EINVAL,
            f"its blocks have {size} bytes; on this device they have at least {max(512, logical)} (with dm-verity, the"
            " size of a data block) and at most 4096",
            function,
        )


def _check_squashfs(head: bytes, size: int) -> None:
    version = _SQUASHFS_VERSION.unpack_from(head)
    if version != (4, 0):
        raise KernelError(errno.EINVAL, f"its version is {version[0]}.{version[1]}, not 4.0", "squashfs_fill_super")
    used = _SQUASHFS_BYTES_USED.unpack_from(head)[0]
    if not 0 <= used <= size:
        raise KernelError(
            errno.EINVAL,
            f"its superblock says that {used} bytes are used, and the image has {size}",
            "squashfs_fill_super",
        )


def _check_ext4(superblock: bytes, size: int, logical_block_size: int) -> None:
    blocks, log_block_size, incompatible = _EXT4.unpack_from(superblock)
    block_size = 1024 << min(log_block_size, 53)
    _check_block_size(block_size, logical_block_size, "ext4_load_super")
    if incompatible & _EXT4_64BIT:
        blocks |= _EXT4_BLOCKS_HIGH.unpack_from(superblock)[0] << 32
    if blocks > size // block_size:
        raise KernelError(
            errno.EINVAL,
            f"bad geometry: block count {blocks} exceeds size of device ({size // block_size} blocks)",
            "ext4_check_geometry",
        )
    if incompatible & _EXT4_NEEDS_RECOVERY:
        raise KernelError(
            errno.EROFS,
            "its journal needs recovery, and what dm-verity protects cannot be written: mount it once, read and write,"
            " and unmount it, before its hash tree is made",
            "ext4_load_journal",
        )


def _check_erofs(superblock: bytes, logical_block_size: int) -> None:
    checksum, compatible, block_bits, slots = _EROFS.unpack_from(superblock)
    _check_block_size(1 << min(block_bits, 63), logical_block_size, "erofs_fc_fill_super")
    if compatible & _EROFS_HAS_CHECKSUM:
        block_size = 1 << block_bits
        covered = superblock[: block_size - 1024 if block_size > 1024 else block_size]
        found = crc32c(0xFFFFFFFF, covered[:4] + bytes(4) + covered[8:])
        if found != checksum:
            raise KernelError(
                errno.EBADMSG,
                f"invalid checksum {found:#010x}, {checksum:#010x} expected",
                "erofs_superblock_csum_verify",
            )
    if slots > _EROFS_MOST_SLOTS:
        raise KernelError(errno.EINVAL, f"a superblock of {128 + 16 * slots} bytes", "erofs_read_superblock")
