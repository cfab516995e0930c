"""The table of block devices: which there are, by number and by name, and who has claimed them."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.rehearse.block.content import SECTOR, Content, Slice
from ipe_emu.rehearse.block.partition import Partition

#: Majors that a kernel of a distribution hands out dynamically, as on a machine with virtio disks and device-mapper.
VIRTBLK_MAJOR: Final = 254
DM_MAJOR: Final = 253
#: BLOCK_EXT_MAJOR: partitions that have no minor of their own disk.
EXTENDED_MAJOR: Final = 259
#: Minors of each virtio disk (PART_BITS in drivers/block/virtio_blk.c).
_MINORS: Final = 16


@define(eq=False)
class BlockDevice:
    """A block device. ``number`` is its device number (`os.makedev`), ``content`` None while a mapped one is empty.

    ``facts`` is what the block device's security blob says: root hash and signature of dm-verity. ``whole`` is the disk
    of a partition. ``openers`` counts the descriptors that are open on it. ``block_size`` is the logical one, in bytes.
    """

    name: str
    number: int
    content: Content | None
    serial: str = ""
    whole: "BlockDevice | None" = None
    partition: Partition | None = None
    block_size: int = SECTOR
    facts: Facts = NO_FACTS
    openers: int = 0
    sequence: int = 0
    #: BLKROSET, or a mapped device's own state.
    forced_read_only: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return 0 if self.content is None else self.content.size

    @property
    def sectors(self) -> int:
        """Its size in pieces of 512 bytes."""
        return self.size // SECTOR

    @property
    def read_only(self) -> bool:
        """Whether the kernel calls it read-only (``bdev_read_only()``)."""
        return self.forced_read_only or (self.content is not None and self.content.read_only)

    @property
    def shown(self) -> str:
        """Its number, as tables and sysfs have it."""
        return f"{os.major(self.number)}:{os.minor(self.number)}"

    def read(self, offset: int, length: int) -> bytes:
        """Return what is on the device; see `Content.read`. A mapped device without a table is empty."""
        return b"" if self.content is None else self.content.read(offset, length)

    def write(self, offset: int, data: bytes) -> int:
        """Write to the device; see `Content.write`."""
        if self.read_only:
            raise KernelError(errno.EPERM, f"{self.name} is read-only", "blkdev_write_iter")
        if self.content is None:
            raise KernelError(errno.ENOSPC, f"{self.name} has no table", "blkdev_write_iter")
        return self.content.write(offset, data)


@define(eq=False)
class BlockDevices:
    """All block devices of the machine. Safe for threads.

    ``refresh`` is called before anybody is told who has claimed what: whoever finds out late that a claim is over.
    """

    refresh: Callable[[], None] = field(default=lambda: None, repr=False)
    #: How often the machine has written to one of them.
    writes: int = field(default=0, init=False)
    _devices: dict[int, BlockDevice] = field(factory=dict, init=False)
    _holders: dict[int, list[object]] = field(factory=dict, init=False)
    _disks: int = field(default=0, init=False)
    _extended: int = field(default=0, init=False)
    _sequence: int = field(default=0, init=False)
    _lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    def __iter__(self) -> Iterator[BlockDevice]:
        """Yield the devices in the order they came."""
        with self._lock:
            return iter(tuple(self._devices.values()))

    def find(self, number: int) -> BlockDevice | None:
        """Return the device of a number; None if there is none, and opening it is ENXIO."""
        with self._lock:
            return self._devices.get(number)

    def named(self, name: str) -> BlockDevice | None:
        """Return the device of a name in /dev and /sys/block, such as ``vda1``."""
        return next((device for device in self if device.name == name), None)

    def partitions_of(self, disk: BlockDevice) -> tuple[BlockDevice, ...]:
        """Return a disk's partitions."""
        return tuple(device for device in self if device.whole is disk)

    def add(self, device: BlockDevice) -> None:
        """Add a device, whose number must be free."""
        with self._lock:
            if device.number in self._devices:
                raise ValueError(f"there are two devices {device.shown}")
            if device.whole is None:
                self._sequence += 1
                device.sequence = self._sequence
            self._devices[device.number] = device

    def remove(self, device: BlockDevice) -> None:
        """Remove a device."""
        with self._lock:
            del self._devices[device.number]

    def add_disk(self, name: str, content: Content, partitions: tuple[Partition, ...], serial: str = "") -> BlockDevice:
        """Add a virtio disk with its partitions, and return it. Numbers go by the order of disks, as on a bus."""
        with self._lock:
            first = self._disks * _MINORS
            self._disks += 1
            disk = BlockDevice(name, os.makedev(VIRTBLK_MAJOR, first), content, serial=serial)
            self.add(disk)
            for partition in partitions:
                if partition.number < _MINORS:
                    number = os.makedev(VIRTBLK_MAJOR, first + partition.number)
                else:
                    number = os.makedev(EXTENDED_MAJOR, self._extended)
                    self._extended += 1
                part = Slice(content, partition.start * SECTOR, partition.sectors * SECTOR)
                separator = "p" if name[-1].isdigit() else ""
                name_of_it = f"{name}{separator}{partition.number}"
                self.add(BlockDevice(name_of_it, number, part, whole=disk, partition=partition))
        return disk

    # -- exclusive use ------------------------------------------------------------------------------------------

    def claim(self, device: BlockDevice, holder: object) -> None:
        """Claim a device for one holder: a file system, or device-mapper as a whole; it may do so repeatedly.

        KernelError EBUSY if somebody else has it, or its disk, or one of its partitions (``bd_may_claim()``).
        """
        self.refresh()
        with self._lock:
            mine = self._holders.get(device.number, [])
            near = self.partitions_of(device) if device.whole is None else (device.whole,)
            others = [number for number in (d.number for d in near) if self._holders.get(number)]
            if (mine and mine[0] is not holder) or (not mine and others):
                raise KernelError(errno.EBUSY, f"{device.name} is in use", "bd_may_claim")
            self._holders.setdefault(device.number, []).append(holder)

    def release(self, device: BlockDevice, holder: object) -> None:
        """Give back one claim."""
        with self._lock:
            self._holders[device.number].remove(holder)

    def claims(self, device: BlockDevice) -> int:
        """Return how often a device is claimed."""
        self.refresh()
        with self._lock:
            return len(self._holders.get(device.number, ()))
