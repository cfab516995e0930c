import errno
import os
import random
from pathlib import Path

import pytest

from ipe_emu.errors import KernelError, UserError
from ipe_emu.rehearse.block.content import Concatenation, ImageFile, Slice
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.block.disk import Disk, attach
from ipe_emu.rehearse.block.partition import Partition
from tests.rehearse.block.images import Bytes, disk

SIZE = 256 << 10


def image(path: Path, **options: bool) -> ImageFile:
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return ImageFile(os.open(path, os.O_RDWR), **options)


@pytest.mark.parametrize("write_through", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, write_through: bool) -> None:
    content = image(tmp_path / "i", write_through=write_through)
    before = (tmp_path / "i").read_bytes()
    model = bytearray(before)
    seeds = random.Random(2)
    for _ in range(200):
        offset, length = seeds.randrange(SIZE), seeds.choice((1, 511, 512, 4096, 5000, 20_000))
        data = seeds.randbytes(length)
        done = content.write(offset, data)
        assert done == min(length, SIZE - offset)
        model[offset : offset + done] = data[:done]
        start, count = seeds.randrange(SIZE), seeds.randrange(30_000)
        assert content.read(start, count) == model[start : start + count]
    assert content.read(0, SIZE) == model
    assert (tmp_path / "i").read_bytes() == (bytes(model) if write_through else before)
    content.close()


def test_the_ends_of_a_device(tmp_path: Path) -> None:
    content = image(tmp_path / "i")
    assert content.read(SIZE, 10) == b""
    assert content.read(SIZE - 3, 10) == (tmp_path / "i").read_bytes()[-3:]
    assert content.read(-1, 10) == b""
    with pytest.raises(KernelError) as caught:
        content.write(SIZE, b"x")
    assert caught.value.errno == errno.ENOSPC
    content.close()


def test_a_read_only_disk(tmp_path: Path) -> None:
    content = image(tmp_path / "i", read_only=True)
    with pytest.raises(KernelError) as caught:
        content.write(0, b"x")
    assert caught.value.errno == errno.EPERM
    content.close()


@pytest.mark.parametrize("size", [0, 1, 511, 513])
def test_sizes_that_no_disk_has(tmp_path: Path, size: int) -> None:
    path = tmp_path / "i"
    path.write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"--disk vda: {path}: the image has {size} bytes"):
        Disk("vda", path).open()


def test_an_image_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    content = image(tmp_path / "i")
    os.truncate(tmp_path / "i", 1000)
    with pytest.raises(KernelError, match="ends at byte 1000") as caught:
        content.read(0, 4096)
    assert caught.value.errno == errno.EIO
    content.close()


def test_parts_of_contents() -> None:
    whole = Bytes(bytes(range(256)) * 16)
    part = Slice(whole, 1024, 512)
    assert part.read(0, 10_000) == whole.data[1024:1536]
    assert part.write(500, b"a" * 100) == 12
    assert whole.data[1524:1537] == b"a" * 12 + bytes([0])
    both = Concatenation((part, Slice(whole, 0, 1024)), read_only=False)
    assert both.size == 1536
    assert both.read(510, 4) == b"aa" + bytes([0, 1])
    assert both.write(510, b"bbbb") == 4
    assert whole.data[1534:1536] + whole.data[:2] == b"bbbb"
    with pytest.raises(KernelError):
        both.write(1536, b"x")


def test_numbers_and_names(tmp_path: Path) -> None:
    first = disk(tmp_path / "a", 'label: gpt\nsize=1MiB, name="one"\nstart=4MiB, size=1MiB\n')
    second = tmp_path / "b"
    second.write_bytes(bytes(1 << 20))
    devices = BlockDevices()
    attach([Disk("vdb", second, read_only=True), Disk("vda", first, "ABC")], devices)
    assert [(d.name, d.shown, d.sectors) for d in devices] == [
        ("vda", "254:0", 16384), ("vda1", "254:1", 2048), ("vda2", "254:2", 2048), ("vdb", "254:16", 2048),
    ]  # fmt: skip
    assert [d.read_only for d in devices] == [False, False, False, True]
    vda1 = devices.named("vda1")
    assert vda1 is not None
    assert vda1.whole is devices.named("vda")
    assert devices.find(os.makedev(254, 2)) is devices.named("vda2")
    assert devices.find(os.makedev(254, 3)) is None


def test_partitions_beyond_the_sixteen_minors_of_a_disk() -> None:
    devices = BlockDevices()
    many = tuple(Partition(number, number, 1) for number in range(1, 20))
    devices.add_disk("vda", Bytes(bytes(512 * 100)), many)
    assert [d.shown for d in devices][14:20] == ["254:14", "254:15", "259:0", "259:1", "259:2", "259:3"]


def test_who_may_claim() -> None:
    devices = BlockDevices()
    vda = devices.add_disk("vda", Bytes(bytes(51200)), (Partition(1, 1, 10), Partition(2, 20, 10)))
    vda1, vda2 = devices.partitions_of(vda)
    a, b = object(), object()

    def busy(device: BlockDevice, holder: object) -> bool:
        try:
            devices.claim(device, holder)
        except KernelError as error:
            return error.errno == errno.EBUSY
        devices.release(device, holder)
        return False

    devices.claim(vda1, a)
    assert busy(vda1, b)
    assert not busy(vda1, a)
    assert not busy(vda2, b)
    assert busy(vda, a)
    assert busy(vda, b)
    devices.release(vda1, a)
    devices.claim(vda, b)
    assert busy(vda1, a)
    assert busy(vda1, b)  # a disk that is claimed is claimed whole, by whom does not matter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vda=x", Disk("vda", Path("x"))),
        ("vda=a,,b.img,serial=S1,ro", Disk("vda", Path("a,b.img"), "S1", read_only=True)),
        ("vdz=a=b,write", Disk("vdz", Path("a=b"), write=True)),
    ],
)
def test_the_option(text: str, expected: Disk) -> None:
    assert Disk.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("vda", "written as NAME=IMAGE"),
        ("vda=", "written as NAME=IMAGE"),
        ("sda=x", "virtio disks are called vda to vdz"),
        ("vda1=x", "virtio disks are called"),
        ("vda=x,serial=", "1 to 20 visible characters"),
        ("vda=x,serial=a b", "1 to 20 visible characters"),
        ("vda=x,serial=" + "a" * 21, "1 to 20 visible characters"),
        ("vda=x,rw", "'rw' is none of"),
        ("vda=x,ro,write", "'write' is none of"),
        ("vda=x,serial=a,serial=b", "'serial=b' is none of"),
    ],
)
def test_options_that_are_wrong(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Disk.parse(text)


@pytest.mark.parametrize(("names", "complaint"), [(["vdb"], "but no vda"), (["vda", "vda"], "declared twice")])
def test_disks_are_named_in_order(tmp_path: Path, names: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        attach([Disk(name, tmp_path / "x") for name in names], BlockDevices())


def test_images_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Disk("vda", tmp_path / "none").open()
    with pytest.raises(UserError, match="neither a regular file nor a block device"):
        Disk("vda", tmp_path).open()
