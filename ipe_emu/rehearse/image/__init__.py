"""What a boot loader hands to the kernel, read and unpacked as the kernel does: initramfs, UKI, or a directory.

``open_image`` finds out which of these it is; ``unpack`` puts it into a directory and says what the kernel would.
"""

from ipe_emu.rehearse.image.archive import Archive, EndOfArchive, Fault
from ipe_emu.rehearse.image.compression import Limits
from ipe_emu.rehearse.image.cpio import Entry
from ipe_emu.rehearse.image.open import Image, Kind, open_image
from ipe_emu.rehearse.image.rootfs import DeviceNode, Difference, Skipped, Unpacked, unpack

__all__ = [
    "Archive",
    "DeviceNode",
    "Difference",
    "EndOfArchive",
    "Entry",
    "Fault",
    "Image",
    "Kind",
    "Limits",
    "Skipped",
    "Unpacked",
    "open_image",
    "unpack",
]
