"""What a block device adds to /sys and /dev, as values that can be printed before they are made.

Paths are relative to /sys or /dev, the targets of links as readlink(2) gives them.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from typing import Final

from attrs import frozen

from ipe_emu.rehearse.block.device import DM_MAJOR, BlockDevice, BlockDevices

#: Where the first virtio disk of a machine is found, and the next ones (slots of a PCI bus).
_FIRST_SLOT: Final = 4
_READ_AHEAD_KB: Final = 128
#: Seventeen numbers (Documentation/block/stat.rst).
_NO_STATISTICS: Final = " ".join(["       0"] * 17)


@frozen
class Dir:
    """A directory, with those it lies in."""

    path: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"{self.path}/"


@frozen
class File:
    """A file with its content, in place of one that is there."""

    path: str
    content: str
    mode: int = 0o444

    def describe(self) -> str:
        """Say it in one line."""
        return f"{self.path}: {self.content.strip()!r}"


@frozen
class Link:
    """A symbolic link."""

    path: str
    target: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"{self.path} -> {self.target}"


@frozen
class Node:
    """A device node: ``mode`` with its type, ``number`` as os.makedev()."""

    path: str
    mode: int
    number: int

    def describe(self) -> str:
        """Say it in one line."""
        kind = "b" if stat.S_ISBLK(self.mode) else "c"
        return f"{self.path}: {kind} {os.major(self.number)}:{os.minor(self.number)} {stat.S_IMODE(self.mode):04o}"


@frozen
class Gone:
    """Something that is no more, with all that is in it."""

    path: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"{self.path}: removed"


Step = Dir | File | Link | Node | Gone


def is_mapped(device: BlockDevice) -> bool:
    """Whether a device is one of device-mapper's."""
    return os.major(device.number) == DM_MAJOR


def home(devices: BlockDevices, device: BlockDevice) -> str:
    """Return the directory of a device in sysfs."""
    if device.whole is not None:
        return f"{home(devices, device.whole)}/{device.name}"
    if is_mapped(device):
        return f"devices/virtual/block/{device.name}"
    index = [d.name for d in devices if d.whole is None and not is_mapped(d)].index(device.name)
    return f"devices/pci0000:00/0000:00:{_FIRST_SLOT + index:02x}.0/virtio{index}/block/{device.name}"


def sysfs_of(devices: BlockDevices, device: BlockDevice, *, name: str = "", uuid: str = "") -> Iterator[Step]:
    """Yield what sysfs has of a device; ``name`` and ``uuid`` are those of a mapped one."""
    where = home(devices, device)
    yield Dir(where)
    yield from sysfs_state(devices, device, name=name, uuid=uuid)
    up = "../" * (where.count("/") + 1)
    yield Link(f"{where}/subsystem", f"{up}class/block")
    yield Dir(f"{where}/holders")
    yield Dir(f"{where}/power")
    if device.whole is None:
        yield from _disk(device, where)
        yield Link(f"block/{device.name}", f"../{where}")
    yield Link(f"class/block/{device.name}", f"../../{where}")
    yield Link(f"dev/block/{device.shown}", f"../../{where}")


def _disk(device: BlockDevice, where: str) -> Iterator[Step]:
    yield Dir(f"{where}/slaves")
    files = {
        "removable": "0", "ext_range": "256" if not is_mapped(device) else "1", "capability": "0", "hidden": "0",
        "range": "16" if not is_mapped(device) else "1", "events": "", "events_async": "", "events_poll_msecs": "-1",
        "diskseq": str(device.sequence),
    }  # fmt: skip
    if not is_mapped(device):
        files |= {"serial": device.serial, "cache_type": "write back"}
        yield Link(f"{where}/device", "../../../" + where.split("/")[3])
    for name, content in files.items():
        yield File(f"{where}/{name}", content if name == "serial" else content + "\n")


def sysfs_state(devices: BlockDevices, device: BlockDevice, *, name: str = "", uuid: str = "") -> Iterator[Step]:
    """Yield those files of a device that change with it."""
    where = home(devices, device)
    files = {
        "dev": device.shown, "size": str(device.sectors), "ro": str(int(device.read_only)), "alignment_offset": "0",
        "discard_alignment": "0", "inflight": f"{0:8} {0:8}", "stat": _NO_STATISTICS,
        "uevent": "\n".join(f"{key}={value}" for key, value in properties(device).items()),
    }  # fmt: skip
    if device.partition is not None:
        files |= {"partition": str(device.partition.number), "start": str(device.partition.start)}
    else:
        yield Dir(f"{where}/queue")
        files |= {f"queue/{key}": value for key, value in _queue(device).items()}
    if is_mapped(device):
        yield Dir(f"{where}/dm")
        files |= {"dm/name": name, "dm/uuid": uuid, "dm/suspended": "0"}
    for key, value in files.items():
        yield File(f"{where}/{key}", value + "\n", 0o644 if key == "uevent" else 0o444)


def _queue(device: BlockDevice) -> dict[str, str]:
    block_size = str(device.block_size)
    zero = ("discard_granularity", "discard_max_bytes", "discard_zeroes_data", "optimal_io_size", "chunk_sectors",
            "nr_zones", "write_zeroes_max_bytes", "dax", "fua", "iostats", "add_random", "nomerges")  # fmt: skip
    return dict.fromkeys(zero, "0") | {
        "logical_block_size": block_size, "physical_block_size": block_size,
        "hw_sector_size": block_size, "minimum_io_size": block_size, "rotational": "1", "zoned": "none",
        "read_ahead_kb": str(_READ_AHEAD_KB), "max_sectors_kb": "1280", "max_hw_sectors_kb": "2147483647",
        "scheduler": "none", "write_cache": "write back", "nr_requests": "256",
    }  # fmt: skip


def properties(device: BlockDevice) -> dict[str, str]:
    """Return the variables of a device that its events and its ``uevent`` have (``dev_uevent()``)."""
    found = {
        "MAJOR": str(os.major(device.number)),
        "MINOR": str(os.minor(device.number)),
        "DEVNAME": device.name,
        "DEVTYPE": "disk" if device.whole is None else "partition",
        "DISKSEQ": str((device.whole or device).sequence),
    }
    if device.partition is not None:
        found["PARTN"] = str(device.partition.number)
        if device.partition.label:
            found["PARTNAME"] = _seven_bits(device.partition.label)
    return found


def _seven_bits(label: str) -> str:
    """Return a partition's name as the kernel shows it (``utf16_le_to_7bit()``)."""
    codes = (ord(letter) & 0x7F for letter in label)
    return "".join(chr(code) if 0x20 <= code < 0x7F else "!" for code in codes if code)


def devtmpfs_of(device: BlockDevice) -> Iterator[Step]:
    """Yield the node that devtmpfs has of a device (``devtmpfs_create_node()``)."""
    yield Node(device.name, stat.S_IFBLK | 0o600, device.number)


def dependence(devices: BlockDevices, upper: BlockDevice, lower: BlockDevice) -> tuple[Link, Link]:
    """Return the links between a mapped device and one that it maps (``bd_link_disk_holder()``)."""
    above, below = home(devices, upper), home(devices, lower)
    up = "../" * (above.count("/") + 2)
    down = "../" * (below.count("/") + 2)
    return Link(f"{above}/slaves/{lower.name}", up + below), Link(f"{below}/holders/{upper.name}", down + above)


def gone(devices: BlockDevices, device: BlockDevice, slaves: Iterable[BlockDevice]) -> Iterator[Step]:
    """Yield what takes a mapped device away again."""
    for lower in slaves:
        yield Gone(f"{home(devices, lower)}/holders/{device.name}")
    for path in (f"block/{device.name}", f"class/block/{device.name}", f"dev/block/{device.shown}"):
        yield Gone(path)
    yield Gone(home(devices, device))
