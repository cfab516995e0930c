import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ipe_emu.rehearse.block import plan, proc, udev
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.block.partition import Partition
from ipe_emu.rehearse.block.plan import Dir, File, Gone, Link, Node
from ipe_emu.rehearse.block.probe import Probed, probe
from tests.rehearse.block.images import Bytes


@pytest.fixture
def devices() -> BlockDevices:
    devices = BlockDevices()
    part = Partition(1, 2048, 100, "0f5b3a11-2c3d-4e5f-8899-aabbccddeeff", "a b/ü")
    devices.add_disk("vda", Bytes(bytes(1 << 21)), (part,), "S 1")
    devices.add_disk("vdb", Bytes(bytes(1 << 20)), ())
    return devices


def test_every_link_of_sysfs_leads_to_something(devices: BlockDevices, tmp_path: Path) -> None:
    """Carried out, the plan is a tree in which nothing dangles, and it is taken away whole."""
    for name in ("class/block", "dev/block", "block"):
        (tmp_path / name).mkdir(parents=True)
    for device in devices:
        for step in plan.sysfs_of(devices, device):
            assert step.describe()
            match step:
                case Dir(path):
                    (tmp_path / path).mkdir(parents=True, exist_ok=True)
                case File(path, content):
                    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / path).write_text(content)
                case Link(path, target):
                    (tmp_path / path).symlink_to(target)
    links = [path for path in tmp_path.rglob("*") if path.is_symlink() and path.name != "device"]
    assert len(links) > 8
    assert all(path.exists() for path in links)
    assert (tmp_path / "block/vda/vda1/start").read_text() == "2048\n"
    assert (tmp_path / "dev/block/254:1/uevent").read_text().splitlines()[-1] == "PARTNAME=a b/|"
    vdb = devices.named("vdb")
    assert vdb is not None
    for step in plan.gone(devices, vdb, ()):
        assert isinstance(step, Gone)
        place = tmp_path / step.path
        if place.is_symlink():
            place.unlink()
        else:
            shutil.rmtree(place)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("vdb", "254:16")]


def test_nodes_and_lists(devices: BlockDevices) -> None:
    nodes = [step for device in devices for step in plan.devtmpfs_of(device)]
    assert [node.describe() for node in nodes if isinstance(node, Node)] == [
        "vda: b 254:0 0600", "vda1: b 254:1 0600", "vdb: b 254:16 0600",
    ]  # fmt: skip
    assert proc.partitions(devices) == (
        b"major minor  #blocks  name\n\n 254        0       2048 vda\n 254        1         50 vda1\n"
        b" 254       16       1024 vdb\n"
    )
    assert proc.partitions(BlockDevices()) == b""
    assert b"253 device-mapper\n" in proc.drivers()
    assert b"236 device-mapper\n" in proc.misc()


def test_links_of_udev(devices: BlockDevices) -> None:
    part = devices.named("vda1")
    assert part is not None
    probed = Probed("ext4", "1234-5678", "my\\x20root")
    assert {link.path for link in udev.links_of(devices, part, probed)} == {
        "disk/by-path/pci-0000:00:04.0-part1", "disk/by-path/virtio-pci-0000:00:04.0-part1",
        "disk/by-id/virtio-S_1-part1", "disk/by-uuid/1234-5678", "disk/by-label/my\\x20root",
        "disk/by-partuuid/0f5b3a11-2c3d-4e5f-8899-aabbccddeeff", "disk/by-partlabel/a\\x20b\\x2fü",
    }  # fmt: skip
    assert {link.target for link in udev.links_of(devices, part, probed)} == {"../../vda1"}


def test_what_blkid_finds(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(9 << 20))
    uuid = "0f5b3a11-2c3d-4e5f-8899-aabbccddeeff"
    subprocess.run(
        ["/usr/sbin/mkfs.ext4", "-q", "-U", uuid, "-L", "my root", "-E", f"offset={1 << 20}", image, "8M"],
        check=True, timeout=60,
    )  # fmt: skip
    assert probe(os.fspath(image), 1 << 20, 8 << 20) == Probed("ext4", uuid, "my\\x20root")
    assert probe(os.fspath(image), 0, 1 << 20) == Probed()
    assert probe(os.fspath(tmp_path / "none"), 0, 1 << 20) == Probed()
