import errno
import random

import pytest

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.rehearse.device_mapper.crypt import Scratch
from ipe_emu.rehearse.device_mapper.ioctl import Command, Flag
from tests.rehearse.device_mapper.caller import Machine, targets_of

KEY = b"Ab" * 64
LINE = b"aes-xts-plain64 " + KEY + b" 0 /dev/vdb 8 1 allow_discards"


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_what_is_written_is_read_and_the_rest_is_noise(machine: Machine) -> None:
    before = machine.vdb.read(0, machine.vdb.size)
    assert machine.create(b"scratch", (0, 64, b"crypt", LINE), flags=0).errno == 0
    assert "scratch is not encrypted, and what is on vdb not decrypted" in machine.seen.said[0]
    device = machine.devices.named("dm-0")
    assert device is not None
    model = bytearray(device.read(0, 64 * 512))
    assert len(model) == 64 * 512
    assert device.read(0, 64 * 512) == model
    assert model[:4096] not in (bytes(4096), before[4096:8192])
    assert len(set(model)) == 256
    seeds = random.Random(3)
    for _ in range(100):
        offset, data = seeds.randrange(64 * 512), seeds.randbytes(seeds.choice((1, 512, 4096, 9000)))
        done = device.write(offset, data)
        model[offset : offset + done] = data[:done]
        start = seeds.randrange(64 * 512)
        assert device.read(start, 5000) == model[start : start + 5000]
    assert machine.vdb.read(0, machine.vdb.size) == before
    assert device.facts == NO_FACTS
    table = targets_of(machine.call(Command.TABLE_STATUS, name=b"scratch", flags=Flag.STATUS_TABLE))
    assert table == [(0, 64, b"crypt", b"aes-xts-plain64 " + KEY.lower() + b" 0 254:16 8 1 allow_discards")]


def test_a_device_as_large_as_can_be(machine: Machine) -> None:
    """Where the file that keeps it could not be."""
    sectors = (1 << 54) - 8
    assert machine.create(b"low", (0, sectors, b"zero", b""), flags=0).errno == 0
    line = b"aes-xts-plain64 " + KEY + b" 0 253:0 0"
    assert machine.create(b"scratch", (0, sectors, b"crypt", line), flags=0).errno == 0
    device = machine.devices.named("dm-1")
    assert device is not None
    for offset in (1 << 61, sectors * 512 - 512, 0):
        assert device.write(offset, b"x" * 512) == 512
        assert device.read(offset, 1024)[:512] == b"x" * 512
    assert not [said for said in machine.seen.said if said.startswith("?")]


def test_what_cannot_be_kept_is_not_judged() -> None:
    told: list[str] = []
    scratch = Scratch(1 << 20, read_only=False, not_judged=told.append, most_kept=2)
    assert scratch.write(0, b"a" * 8192) == 8192
    assert scratch.write(4096, b"b" * 4096) == 4096
    with pytest.raises(KernelError, match="more than 8192 bytes") as refused:
        scratch.write(8000, b"c" * 4096)
    assert refused.value.errno == errno.EIO
    assert told == ["what is written to a scratch disk cannot be kept: it is more than 8192 bytes"]
    assert scratch.read(0, 8000) == b"a" * 4096 + b"b" * 3904


def test_another_device_has_other_noise(machine: Machine) -> None:
    machine.create(b"a", (0, 8, b"crypt", LINE), flags=0)
    machine.create(b"b", (0, 8, b"crypt", LINE), flags=0)
    a, b = machine.devices.named("dm-0"), machine.devices.named("dm-1")
    assert a is not None
    assert b is not None
    assert a.read(0, 4096) != b.read(0, 4096)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"aes-xts-plain64 " + KEY + b" 0 /dev/vdb", errno.EINVAL),
        (b"aes-xts-plain64 " + KEY[:60] + b" 0 /dev/vdb 0", errno.EINVAL),
        (b"aes-xts-plain64 - 0 /dev/vdb 0", errno.EINVAL),
        (b"aes-cbc-essiv:sha256 " + KEY[:64] + b" x /dev/vdb 0", errno.EINVAL),
        (b"aes-cbc-essiv:sha256 " + KEY[:64] + b" 0 /dev/vdc 0", errno.ENOENT),
        (b"aes-cbc-essiv:sha256 " + KEY[:64] + b" 0 /dev/vdb 0 2 allow_discards", errno.EINVAL),
        (b"aes-cbc-essiv:sha256 " + KEY[:64] + b" 0 /dev/vdb 508", errno.EINVAL),
        (b"aes-cbc-essiv:sha256 " + KEY[:64] + b" 0 /dev/vdb 0", 0),
    ],
)
def test_arguments(machine: Machine, line: bytes, error: int) -> None:
    assert machine.create(b"a", (0, 8, b"crypt", line), flags=0).errno == error
    assert machine.devices.claims(machine.vdb) == (0 if error else 1)


@pytest.mark.parametrize(
    "line",
    [
        b"serpent-xts-plain64 " + KEY + b" 0 /dev/vdb 0",
        b"aes-xts-plain64 :64:logon:key 0 /dev/vdb 0",
        b"aes-xts-plain64 " + KEY + b" 0 /dev/vdb 0 1 sector_size:4096",
        b"capi:gcm(aes)-random " + KEY + b" 0 /dev/vdb 0 1 integrity:28:aead",
    ],
)
def test_what_is_not_emulated(machine: Machine, line: bytes) -> None:
    with pytest.raises(NotJudgedError, match="crypt"):
        machine.create(b"a", (0, 8, b"crypt", line), flags=0)
    assert machine.devices.claims(machine.vdb) == 0
