"""The option ``--disk NAME=IMAGE[,serial=TEXT][,ro|,write]``."""

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.errors import KernelError, UserError
from ipe_emu.rehearse.block.content import SECTOR, ImageFile
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.block.partitions import read_partitions
from ipe_emu.rehearse.block.probe import Probed, probe

_NAME: Final = re.compile(r"vd[a-z]", re.ASCII)
#: VIRTIO_BLK_ID_BYTES
_LONGEST_SERIAL: Final = 20
_SERIAL: Final = re.compile(rf"[!-+\--~]{{1,{_LONGEST_SERIAL}}}", re.ASCII)


@frozen
class Disk:
    """A disk as a user declares it. Without ``write``, what is written to it is forgotten at the end.

    ``read_only`` makes it a disk that says of itself that it is.
    """

    name: str
    image: Path
    serial: str = ""
    read_only: bool = False
    write: bool = False

    @classmethod
    def parse(cls, text: str) -> "Disk":
        """Read the option's argument. UserError says what is wrong with it. A comma in a path is written twice."""
        fields = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        name, equals, image = fields[0].partition("=")
        if not equals or not image:
            raise UserError(f"--disk {text}: written as NAME=IMAGE, for example vda=root.img")
        if not _NAME.fullmatch(name):
            raise UserError(f"--disk {text}: the name is {name!r}; virtio disks are called vda to vdz")
        serial, mode = "", ""
        for option in fields[1:]:
            key, equals, value = option.partition("=")
            if key == "serial" and equals and not serial:
                if not _SERIAL.fullmatch(value):
                    raise UserError(f"--disk {text}: a serial number is 1 to {_LONGEST_SERIAL} visible characters")
                serial = value
            elif option in {"ro", "write"} and not mode:
                mode = option
            else:
                raise UserError(f"--disk {text}: {option!r} is none of serial=TEXT, ro, write, or one too many")
        return cls(name, Path(image), serial, mode == "ro", mode == "write")

    def describe(self) -> str:
        """Say what it is in one line."""
        writes = "read-only" if self.read_only else "written to" if self.write else "its image stays as it is"
        return f"{self.name}: {self.image} ({writes}{', serial ' + self.serial if self.serial else ''})"

    def open(self) -> ImageFile:
        """Open its image. UserError if it cannot be, or is no disk."""
        flags = os.O_RDWR if self.write else os.O_RDONLY
        try:
            fd = os.open(self.image, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise UserError(f"--disk {self.name}: {self.image}: {getattr(error, 'strerror', error)}") from None
        try:
            return ImageFile(_checked(fd), self.read_only, self.write)
        except UserError as error:
            os.close(fd)
            raise UserError(f"--disk {self.name}: {self.image}: {error}") from None


def probe_all(disks: Iterable[Disk], devices: BlockDevices) -> dict[str, Probed]:
    """Return what blkid finds on disks and their partitions, by their names, as long as nothing was written to them."""
    found = {}
    for disk in disks:
        whole = devices.named(disk.name)
        if whole is not None:
            for device in (whole, *devices.partitions_of(whole)):
                start = device.partition.start * SECTOR if device.partition else 0
                found[device.name] = probe(os.fspath(disk.image), start, device.size)
    return found


def _checked(fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise UserError("neither a regular file nor a block device")
    return fd


def attach(disks: Iterable[Disk], devices: BlockDevices, *, force_gpt: bool = False) -> None:
    """Open all images, read their partitions and add them to the table of devices.

    Disks are named by their order on the bus, so that names go up without a gap: UserError for vdb without vda, for two
    of one name, and as `Disk.open` and `read_partitions`.
    """
    ordered = sorted(disks, key=lambda disk: disk.name)
    for index, disk in enumerate(ordered):
        expected = f"vd{chr(ord('a') + index)}"
        if disk.name != expected:
            problem = "is declared twice" if index and disk.name == ordered[index - 1].name else f"but no {expected}"
            raise UserError(f"--disk {disk.name} {problem}: a kernel names the disks it finds vda, vdb, … in order")
    for disk in ordered:
        image = disk.open()
        try:
            partitions = read_partitions(image, force_gpt=force_gpt)
        except (KernelError, UserError) as error:
            image.close()
            reason = error.reason if isinstance(error, KernelError) and error.errno == errno.EIO else error
            raise UserError(f"--disk {disk.name}: {disk.image}: {reason}") from None
        devices.add_disk(disk.name, image, partitions, disk.serial)
