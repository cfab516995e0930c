"""What the kernel tells of block devices: texts alone, no boot."""

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.block.uevents import event, synthetic
from tests.rehearse.block.images import Bytes

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def test_an_event_of_a_disk() -> None:
    devices = BlockDevices()
    disk = devices.add_disk("vda", Bytes(bytes(4096)), ())
    assert event(devices, disk, "change", {"SYNTH_UUID": "0"}).split(b"\0") == [
        b"change@/devices/pci0000:00/0000:00:04.0/virtio0/block/vda", b"ACTION=change",
        b"DEVPATH=/devices/pci0000:00/0000:00:04.0/virtio0/block/vda", b"SUBSYSTEM=block", b"SYNTH_UUID=0",
        b"MAJOR=254", b"MINOR=0", b"DEVNAME=vda", b"DEVTYPE=disk", b"DISKSEQ=1", b"",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "action", "more"),
    [
        ("add", "add", {"SYNTH_UUID": "0"}),
        ("change\n", "change", {"SYNTH_UUID": "0"}),
        (f"add {UUID}", "add", {"SYNTH_UUID": UUID}),
        (f"add {UUID} A=1 b2=c\n", "add", {"SYNTH_UUID": UUID, "SYNTH_ARG_A": "1", "SYNTH_ARG_b2": "c"}),
    ],
)
def test_what_may_be_written(text: str, action: str, more: dict[str, str]) -> None:
    assert synthetic(text) == (action, more)


@pytest.mark.parametrize("text", ["", "\n", "added", "add x", f"add {UUID} A", f"add {UUID} A=_", f"add {UUID} =1"])
def test_what_may_not(text: str) -> None:
    with pytest.raises(KernelError, match="EINVAL"):
        synthetic(text)
