"""ioctl(2) on block devices: what block/ioctl.c answers."""

import errno
import struct
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.rehearse.block.content import SECTOR
from ipe_emu.rehearse.block.device import DM_MAJOR, BlockDevice, BlockDevices
from ipe_emu.rehearse.block.partitions import read_partitions

#: _IOC_TYPE of the block layer's commands, and HDIO_GETGEO.
BLK: Final = 0x12
HDIO_GETGEO: Final = 0x0301

_PAGE: Final = 4096
_PIECE: Final = 1 << 20
#: More would keep everybody waiting.
_MOST_ZEROS: Final = 1 << 30
_INT: Final = struct.Struct("=i")
_UNSIGNED: Final = struct.Struct("=I")
_UNSIGNED_SHORT: Final = struct.Struct("=H")
_U64: Final = struct.Struct("=Q")
_RANGE: Final = struct.Struct("=QQ")
_GEOMETRY: Final = struct.Struct("=BBHxxxxQ")

_BLKROSET: Final = 0x125D
_BLKRRPART: Final = 0x125F
_BLKFLSBUF: Final = 0x1261
_BLKRASET: Final = 0x1262
_BLKFRASET: Final = 0x1264
_BLKPG: Final = 0x1269
_BLKBSZSET: Final = 0x40081271
_BLKDISCARD: Final = 0x1277
_BLKSECDISCARD: Final = 0x127D
_BLKZEROOUT: Final = 0x127F


class Caller(Protocol):
    """Who asks."""

    @property
    def capable(self) -> bool:
        """Whether it has CAP_SYS_ADMIN."""

    @property
    def may_write(self) -> bool:
        """Whether its descriptor is open for writing."""

    def copy_in(self, length: int) -> bytes:
        """Return what the argument points to; KernelError EFAULT."""

    def copy_out(self, data: bytes) -> None:
        """Write to where the argument points; KernelError EFAULT."""


def _soft_block_size(device: BlockDevice) -> int:
    """The block size of its page cache (``set_init_blocksize()``)."""
    size = device.block_size
    while size < _PAGE and not device.size & size:
        size <<= 1
    return size


def _geometry(device: BlockDevice) -> bytes:
    """``virtblk_getgeo()``, and ``dm_blk_getgeo()`` for a device that was given none."""
    if device.number >> 8 & 0xFFF == DM_MAJOR:
        return _GEOMETRY.pack(0, 0, 0, 0)
    start = device.partition.start if device.partition else 0
    return _GEOMETRY.pack(64, 32, ((device.whole or device).sectors >> 11) & 0xFFFF, start)


#: What only tells something of the device: the bytes that are written to where the argument points.
_TELLS: Final[Mapping[int, Callable[[BlockDevice], bytes]]] = {
    HDIO_GETGEO: _geometry,
    0x125E: lambda device: _INT.pack(device.read_only),  # BLKROGET
    0x1260: lambda device: _U64.pack(device.sectors),  # BLKGETSIZE
    0x1268: lambda device: _INT.pack(device.block_size),  # BLKSSZGET
    0x1278: lambda device: _UNSIGNED.pack(device.block_size),  # BLKIOMIN
    0x127B: lambda device: _UNSIGNED.pack(device.block_size),  # BLKPBSZGET
    0x80081270: lambda device: _INT.pack(_soft_block_size(device)),  # BLKBSZGET
    0x80081272: lambda device: _U64.pack(device.size),  # BLKGETSIZE64
    0x80081280: lambda device: _U64.pack((device.whole or device).sequence),  # BLKGETDISKSEQ
}
#: The same for all, as a virtio disk without any extras has it.
_SAME_FOR_ALL: Final[Mapping[int, bytes]] = {
    0x1263: _U64.pack(256),  # BLKRAGET
    0x1265: _U64.pack(256),  # BLKFRAGET
    0x1267: _UNSIGNED_SHORT.pack(2560),  # BLKSECTGET
    0x1279: _UNSIGNED.pack(0),  # BLKIOOPT
    0x127A: _INT.pack(0),  # BLKALIGNOFF
    0x127C: _UNSIGNED.pack(0),  # BLKDISCARDZEROES
    0x127E: _UNSIGNED_SHORT.pack(1),  # BLKROTATIONAL
    0x80041284: _UNSIGNED.pack(0),  # BLKGETZONESZ
    0x80041285: _UNSIGNED.pack(0),  # BLKGETNRZONES
}


def block_ioctl(devices: BlockDevices, device: BlockDevice, request: int, caller: Caller) -> None:
    """Carry out an ioctl on an open device (``blkdev_ioctl()``).

    KernelError as the kernel, ENOTTY for what no block device knows; NotJudgedError for what is not emulated.
    """
    request &= 0xFFFFFFFF
    if request in _TELLS:
        caller.copy_out(_TELLS[request](device))
    elif request in _SAME_FOR_ALL:
        caller.copy_out(_SAME_FOR_ALL[request])
    elif request in {_BLKROSET, _BLKRRPART, _BLKFLSBUF, _BLKRASET, _BLKFRASET, _BLKBSZSET, _BLKPG}:
        if not caller.capable:
            raise KernelError(errno.EACCES, "CAP_SYS_ADMIN is missing", "blkdev_ioctl")
        _privileged(devices, device, request, caller)
    elif request in {_BLKDISCARD, _BLKSECDISCARD}:
        _must_write(caller)
        raise KernelError(errno.EOPNOTSUPP, "a disk that knows no discarding", "blk_ioctl_discard")
    elif request == _BLKZEROOUT:
        _must_write(caller)
        _zero_out(devices, device, *_RANGE.unpack(caller.copy_in(_RANGE.size)))
    else:
        raise KernelError(errno.ENOTTY, f"no ioctl {request:#x} of a block device", "blkdev_ioctl")


def _privileged(devices: BlockDevices, device: BlockDevice, request: int, caller: Caller) -> None:
    if request == _BLKROSET:
        device.forced_read_only = bool(_INT.unpack(caller.copy_in(_INT.size))[0])
    elif request == _BLKRRPART:
        _scan_partitions(devices, device)
    elif request == _BLKBSZSET:
        size = _INT.unpack(caller.copy_in(_INT.size))[0]
        if size & (size - 1) or not device.block_size <= size <= _PAGE:
            raise KernelError(errno.EINVAL, f"{size} is no block size of the device", "set_blocksize")
    elif request == _BLKPG:
        raise NotJudgedError("partitions that a program adds or deletes (BLKPG)")


def _scan_partitions(devices: BlockDevices, device: BlockDevice) -> None:
    """Read the partition table again (``disk_scan_partitions()``), which must not have changed."""
    if device.whole is not None or device.number >> 8 & 0xFFF == DM_MAJOR:
        raise KernelError(errno.EINVAL, "no device that has partitions", "disk_scan_partitions")
    partitions = devices.partitions_of(device)
    if devices.claims(device) or any(part.openers or devices.claims(part) for part in partitions):
        raise KernelError(errno.EBUSY, "a partition is in use", "bdev_disk_changed")
    if device.content is not None and read_partitions(device.content) != tuple(p.partition for p in partitions):
        raise NotJudgedError(f"{device.name} got other partitions, which do not appear here")


def _must_write(caller: Caller) -> None:
    if not caller.may_write:
        raise KernelError(errno.EBADF, "the device is not open for writing", "blk_ioctl_discard")


def _zero_out(devices: BlockDevices, device: BlockDevice, start: int, length: int) -> None:
    """Write zeros (``blk_ioctl_zeroout()``)."""
    if start % SECTOR or length % SECTOR or not length or start + length > device.size:
        raise KernelError(errno.EINVAL, "not a range of sectors of the device", "blk_ioctl_zeroout")
    if length > _MOST_ZEROS:
        raise NotJudgedError(f"writing {length} zeros at once to {device.name}")
    try:
        while length:
            done = device.write(start, bytes(min(length, _PIECE)))
            start, length = start + done, length - done
    finally:  # as after any other write
        devices.writes += 1
