"""The links that udev makes in /dev/disk (rules.d/60-persistent-storage.rules)."""

import string
from collections.abc import Iterator
from typing import Final

from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.block.plan import Link, home, is_mapped
from ipe_emu.rehearse.block.probe import Probed

#: What stays as it is in an encoded name (``blkid_encode_string()``).
_PLAIN: Final = frozenset(string.ascii_letters + string.digits + "#+-.:=@_")


def encode(name: str) -> str:
    """Write a name as it can stand in a link: a slash, or what else is not plain ASCII, as its code."""
    return "".join(letter if letter in _PLAIN or ord(letter) > 0x7F else f"\\x{ord(letter):02x}" for letter in name)


def replace(name: str) -> str:
    """Write an attribute of a device as udev puts it into a link: what is not safe there is an underscore."""
    return "".join(letter if letter in _PLAIN else "_" for letter in name)


def links_of(devices: BlockDevices, device: BlockDevice, probed: Probed) -> Iterator[Link]:
    """Yield the links to a disk or partition; ``probed`` is what is on it. Paths are below /dev."""
    part = f"-part{device.partition.number}" if device.partition else ""
    serial = (device.whole or device).serial
    names = []
    if not is_mapped(device):
        slot = home(devices, device.whole or device).split("/")[2]
        names += [f"by-path/pci-{slot}{part}", f"by-path/virtio-pci-{slot}{part}"]
        if serial:
            names.append(f"by-id/virtio-{replace(serial)}{part}")
    if probed.uuid:
        names.append(f"by-uuid/{probed.uuid}")
    if probed.label:
        names.append(f"by-label/{probed.label}")
    if device.partition is not None:
        if device.partition.uuid:
            names.append(f"by-partuuid/{device.partition.uuid}")
        if device.partition.label:
            names.append(f"by-partlabel/{encode(device.partition.label)}")
    for name in names:
        yield Link(f"disk/{name}", f"../../{device.name}")
