import errno
import struct
from pathlib import Path

import pytest
from attrs import define

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.block.ioctls import block_ioctl
from ipe_emu.rehearse.block.partitions import read_partitions
from tests.rehearse.block.images import Bytes, disk

BLKROSET, BLKROGET, BLKRRPART, BLKFLSBUF, BLKPG = 0x125D, 0x125E, 0x125F, 0x1261, 0x1269
BLKGETSIZE, BLKSSZGET, BLKDISCARD, BLKZEROOUT = 0x1260, 0x1268, 0x1277, 0x127F
BLKGETSIZE64, BLKBSZGET, BLKBSZSET, HDIO_GETGEO = 0x80081272, 0x80081270, 0x40081271, 0x0301


@define(eq=False)
class Endless:
    """A large device, which only counts what is written to it."""

    size: int = 1 << 40
    read_only: bool = False
    written: int = 0

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: bytes) -> int:
        self.written += len(data)
        return len(data)


@define
class Asking:
    """A caller whose argument points to ``memory``."""

    memory: bytes = b""
    capable: bool = True
    may_write: bool = True
    written: bytes = b""

    def copy_in(self, length: int) -> bytes:
        if length > len(self.memory):
            raise KernelError(errno.EFAULT, "", "copy_from_user")
        return self.memory[:length]

    def copy_out(self, data: bytes) -> None:
        self.written += data


@define
class Disk:
    devices: BlockDevices
    whole: BlockDevice
    part: BlockDevice

    def ask(self, request: int, device: BlockDevice | None = None, **caller: object) -> bytes | str:
        """Return what was written to the caller, or the errno's symbol."""
        asking = Asking(**caller)  # type: ignore[arg-type]  # values of any type
        try:
            block_ioctl(self.devices, device or self.whole, request, asking)
        except KernelError as error:
            return error.name
        return asking.written


@pytest.fixture
def it(tmp_path: Path) -> Disk:
    content = Bytes(disk(tmp_path / "disk", "label: gpt\nsize=1MiB\n", 4 << 20).read_bytes())
    devices = BlockDevices()
    whole = devices.add_disk("vda", content, read_partitions(content))
    return Disk(devices, whole, devices.partitions_of(whole)[0])


def test_what_a_device_tells(it: Disk) -> None:
    assert it.ask(BLKGETSIZE64) == struct.pack("<Q", 4 << 20)
    assert it.ask(BLKGETSIZE64, it.part) == struct.pack("<Q", 1 << 20)
    assert it.ask(BLKGETSIZE | 0xFFFFFFFF00000000) == struct.pack("<Q", 8192)  # the kernel takes an unsigned int
    assert it.ask(BLKSSZGET) == struct.pack("<i", 512)
    assert it.ask(BLKBSZGET) == struct.pack("<i", 4096)
    assert it.ask(0x1263) == struct.pack("<Q", 256)
    assert it.ask(0x127E) == struct.pack("<H", 1)
    assert it.part.partition is not None
    assert it.ask(HDIO_GETGEO, it.part) == struct.pack("<BBHxxxxQ", 64, 32, 4, it.part.partition.start)
    for request in (0x5310, 0x12FF, 0x5401, 0):
        assert it.ask(request) == "ENOTTY"


def test_what_takes_a_capability(it: Disk) -> None:
    for request in (BLKROSET, BLKRRPART, BLKFLSBUF, BLKBSZSET, BLKPG):
        assert it.ask(request, capable=False) == "EACCES"
    assert it.ask(BLKFLSBUF) == b""
    assert it.ask(BLKROSET) == "EFAULT"
    assert it.ask(BLKROSET, memory=struct.pack("<i", 1)) == b""
    assert it.ask(BLKROGET) == struct.pack("<i", 1)
    with pytest.raises(KernelError, match="read-only"):
        it.whole.write(0, b"x")
    assert it.ask(BLKBSZSET, memory=struct.pack("<i", 1024)) == b""
    for size in (0, -1, 100, 256, 8192):
        assert it.ask(BLKBSZSET, memory=struct.pack("<i", size)) == "EINVAL"


def test_zeros(it: Disk) -> None:
    it.part.write(0, b"x" * 4096)
    assert it.ask(BLKZEROOUT, it.part, memory=struct.pack("<QQ", 512, 1024)) == b""
    assert it.part.read(0, 2048) == b"x" * 512 + bytes(1024) + b"x" * 512
    for start, length in ((1, 512), (0, 100), (0, 0), (1 << 20, 512), (0, (1 << 20) + 512), (512, (1 << 64) - 512)):
        assert it.ask(BLKZEROOUT, it.part, memory=struct.pack("<QQ", start, length)) == "EINVAL"
    assert it.ask(BLKZEROOUT, it.part, may_write=False) == "EBADF"
    assert it.ask(BLKDISCARD, it.part, memory=bytes(16)) == errno.errorcode[errno.EOPNOTSUPP]


def test_zeros_are_writes_and_not_endless(it: Disk) -> None:
    before = it.devices.writes
    assert it.ask(BLKZEROOUT, it.part, memory=struct.pack("<QQ", 0, 512)) == b""
    assert it.devices.writes == before + 1  # who keeps what he has read of a disk goes by that
    it.part.content = Endless()
    most = 1 << 30
    with pytest.raises(NotJudgedError, match=f"writing {most + 512} zeros at once"):
        it.ask(BLKZEROOUT, it.part, memory=struct.pack("<QQ", 0, most + 512))
    assert it.part.content.written == 0
    assert it.ask(BLKZEROOUT, it.part, memory=struct.pack("<QQ", 512, most)) == b""
    assert it.part.content.written == most


def test_reading_the_partitions_again(it: Disk) -> None:
    assert it.ask(BLKRRPART) == b""
    assert it.ask(BLKRRPART, it.part) == "EINVAL"
    it.part.openers = 1
    assert it.ask(BLKRRPART) == "EBUSY"
    it.part.openers = 0
    it.devices.claim(it.part, "a file system")
    assert it.ask(BLKRRPART) == "EBUSY"
    it.devices.release(it.part, "a file system")
    it.whole.write(512, bytes(512))
    with pytest.raises(NotJudgedError, match="vda got other partitions"):
        it.ask(BLKRRPART)
    with pytest.raises(NotJudgedError, match="BLKPG"):
        it.ask(BLKPG)
