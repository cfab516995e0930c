"""The files of /proc that list block devices and their drivers."""

from typing import Final

from ipe_emu.rehearse.block.device import DM_MAJOR, EXTENDED_MAJOR, VIRTBLK_MAJOR, BlockDevices

_CHARACTER: Final = {
    1: "mem", 4: "/dev/vc/0", 5: "/dev/tty", 7: "vcs", 10: "misc", 13: "input", 29: "fb", 128: "ptm", 136: "pts",
    180: "usb", 226: "drm",
}  # fmt: skip
#: What else has a major of its own: two names that programs look for.
_MORE_CHARACTER: Final = ((4, "tty"), (4, "ttyS"), (5, "/dev/console"), (5, "/dev/ptmx"))
_BLOCK: Final = {7: "loop", DM_MAJOR: "device-mapper", VIRTBLK_MAJOR: "virtblk", EXTENDED_MAJOR: "blkext"}
_MISC: Final = {
    236: "device-mapper", 234: "btrfs-control", 229: "fuse", 235: "autofs", 237: "loop-control", 183: "hw_random",
    227: "mcelog", 231: "snapshot",
}  # fmt: skip


def partitions(devices: BlockDevices) -> bytes:
    """Return /proc/partitions (``show_partition()``): what has a size, in KiB."""
    lines = ["major minor  #blocks  name\n\n"]
    for device in devices:
        if device.sectors:
            major, minor = device.shown.split(":")
            lines.append(f"{major:>4}  {minor:>7} {device.sectors >> 1:>10} {device.name}\n")
    return "".join(lines).encode() if len(lines) > 1 else b""


def drivers() -> bytes:
    """Return /proc/devices."""
    characters = sorted([*_CHARACTER.items(), *_MORE_CHARACTER], key=lambda entry: entry[0])
    lines = ["Character devices:", *(f"{major:>3} {name}" for major, name in characters)]
    lines += ["", "Block devices:", *(f"{major:>3} {name}" for major, name in sorted(_BLOCK.items()))]
    return "".join(line + "\n" for line in lines).encode()


def misc() -> bytes:
    """Return /proc/misc."""
    return "".join(f"{minor:>3} {name}\n" for minor, name in _MISC.items()).encode()
