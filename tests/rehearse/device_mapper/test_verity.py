import errno
import random
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.dm_verity import CorruptedError, Parameters, format_image
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.rehearse.device_mapper.ioctl import Command, Flag
from tests.rehearse.block.images import Bytes
from tests.rehearse.device_mapper.caller import Machine, Reply, targets_of

BLOCKS = 60
PARAMETERS = Parameters(BLOCKS, "sha256", 1, 4096, 4096, b"salt")


def made(path: Path, parameters: Parameters = PARAMETERS, seed: int = 3) -> tuple[bytes, bytes, bytes]:
    """Make data and a hash tree that begins at byte 4096 of a device of its own; return both and the root hash."""
    data = bytearray(random.Random(seed).randbytes(parameters.data_size))
    data[5 * 4096 : 6 * 4096] = bytes(4096)
    path.mkdir()
    (path / "data").write_bytes(data)
    with (path / "data").open("rb") as data_file, (path / "hash").open("w+b") as hash_file:
        root_hash = format_image(data_file.fileno(), hash_file.fileno(), parameters, 4096, identity=None)
    return bytes(data), (path / "hash").read_bytes(), root_hash


@define
class Verity:
    machine: Machine
    root_hash: bytes
    words: list[bytes]

    def create(self, *options: bytes, length: int = BLOCKS * 8, flags: int = Flag.READONLY, **changed: Any) -> Reply:
        """Create the device; ``changed`` are words by number (``w0`` to ``w9``)."""
        words = list(self.words)
        for name, word in changed.items():
            words[int(name[1:])] = word
        line = b" ".join([*words, *([b"%d" % len(options), *options] if options else [])])
        return self.machine.create(b"root", (0, length, b"verity", line), flags=flags)

    def table(self) -> bytes:
        return targets_of(self.machine.call(Command.TABLE_STATUS, name=b"root", flags=Flag.STATUS_TABLE))[0][3]

    def status(self) -> bytes:
        return targets_of(self.machine.call(Command.TABLE_STATUS, name=b"root"))[0][3]

    def read(self, offset: int, length: int) -> bytes:
        device = self.machine.devices.named("dm-0")
        assert device is not None
        return device.read(offset, length)

    @property
    def facts(self) -> Facts:
        device = self.machine.devices.named("dm-0")
        return device.facts if device else NO_FACTS

    def disk(self, name: str) -> Bytes:
        device = self.machine.devices.named(name)
        assert device is not None
        assert isinstance(device.content, Bytes)
        return device.content


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, bytes]:
    return made(tmp_path_factory.mktemp("verity") / "image")


def verity_of(
    image: tuple[bytes, bytes, bytes], *, kernel: str = "linux-7.3", require_signatures: bool = False
) -> Verity:
    machine = Machine(kernel, require_signatures=require_signatures)
    data, tree, root_hash = image
    machine.vda.content, machine.vdb.content = Bytes(data), Bytes(tree)
    words = [
        b"1",
        b"/dev/vda",
        b"/dev/vdb",
        b"4096",
        b"4096",
        b"%d" % BLOCKS,
        b"1",
        b"sha256",
        root_hash.hex().encode(),
        b"salt".hex().encode(),
    ]
    return Verity(machine, root_hash, words)


@pytest.fixture
def verity(image: tuple[bytes, bytes, bytes]) -> Verity:
    return verity_of(image)


def test_a_device_reads_what_the_root_hash_vouches_for(verity: Verity) -> None:
    assert verity.create().errno == 0
    assert verity.read(0, BLOCKS * 4096 + 5) == verity.disk("vda").data
    assert verity.read(4000, 200) == verity.disk("vda").data[4000:4200]
    assert verity.status() == b"V -"
    assert verity.table() == b" ".join([b"1 254:0 254:16", *verity.words[3:]])
    assert verity.facts == Facts(dmverity_roothash=Digest("sha256", verity.root_hash))
    device = verity.machine.devices.named("dm-0")
    assert device is not None
    assert (device.read_only, device.block_size, device.sectors) == (True, 4096, BLOCKS * 8)
    with pytest.raises(KernelError) as caught:
        device.write(0, b"x")
    assert caught.value.errno == errno.EPERM


def test_older_kernels_count_no_corrections(image: tuple[bytes, bytes, bytes]) -> None:
    verity = verity_of(image, kernel="linux-6.12")
    verity.create()
    assert verity.status() == b"V"
    verity.disk("vda").data[0] ^= 1
    with pytest.raises(CorruptedError):
        verity.read(0, 1)
    assert verity.status() == b"C"


def test_the_facts_hold_while_the_device_does(verity: Verity) -> None:
    verity.machine.call(Command.DEV_CREATE, name=b"root")
    device = next(iter(verity.machine.dm)).block_device
    line = b" ".join(verity.words)
    assert verity.machine.load(b"root", (0, BLOCKS * 8, b"verity", line)).errno == 0
    assert device.facts == NO_FACTS  # until it is resumed (verity_preresume)
    verity.machine.call(Command.DEV_SUSPEND, name=b"root")
    assert device.facts.dmverity_roothash is not None
    verity.machine.call(Command.DEV_REMOVE, name=b"root")
    assert (device.facts, device.content) == (NO_FACTS, None)


@pytest.mark.parametrize(
    ("option", "action"),
    [
        (b"", "eio"),
        (b"restart_on_corruption", "restart"),
        (b"PANIC_on_corruption", "panic"),
        (b"ignore_corruption", "ignore"),
    ],
)
def test_a_corrupted_block(verity: Verity, option: bytes, action: str) -> None:
    verity.disk("vda").data[7 * 4096 + 1] ^= 1
    verity.create(*filter(None, [option]))
    assert verity.read(0, 7 * 4096) == verity.disk("vda").data[: 7 * 4096]
    assert verity.status() == b"V -"
    if action == "ignore":
        assert verity.read(7 * 4096, 4096) == verity.disk("vda").data[7 * 4096 : 8 * 4096]
    else:
        with pytest.raises(CorruptedError, match="data block 7 ") as caught:
            verity.read(6 * 4096, 8192)
        assert caught.value.errno == errno.EIO
    assert verity.machine.seen.said[-1] == f"!root {action}"
    assert verity.status() == b"C -"


@pytest.mark.parametrize("option", [b"", b"ignore_corruption", b"restart_on_corruption", b"panic_on_corruption"])
def test_corruption_that_nobody_reads(verity: Verity, option: bytes) -> None:
    """A kernel may read it ahead, and two of the options end the machine then."""
    verity.disk("vda").data[7 * 4096 + 1] ^= 1
    ends = option.startswith((b"restart", b"panic"))
    verity.create(*filter(None, [option]))
    verity.machine.dm.finish()
    assert not any(said.startswith("?") for said in verity.machine.seen.said)  # nobody has read anything
    verity.machine.call(Command.DEV_REMOVE, name=b"root")
    for end in (lambda: verity.machine.call(Command.DEV_REMOVE, name=b"root"), verity.machine.dm.finish):
        verity.create(*filter(None, [option]))
        verity.read(0, 4096)
        end()
        doubts = [said for said in verity.machine.seen.said if said.startswith("?")]
        assert len(doubts) == ends
        assert all("is corrupted where it was not read: data block 7 " in doubt for doubt in doubts)
        verity.machine.seen.said.clear()
    assert verity.status() == b"V -"


def test_nothing_is_in_doubt_of_an_intact_device(verity: Verity) -> None:
    verity.create(b"restart_on_corruption")
    verity.read(0, 4096)
    verity.machine.dm.finish()
    assert verity.machine.seen.said[-1] == "=root"


@pytest.mark.parametrize(
    ("option", "told"), [(b"", []), (b"Restart_on_error", ["#root restart"]), (b"panic_on_error", ["#root panic"])]
)
@pytest.mark.parametrize("disk", ["vda", "vdb"])
def test_a_read_error_is_no_corruption(verity: Verity, option: bytes, told: list[str], disk: str) -> None:
    verity.create(*filter(None, [option]))
    verity.machine.devices.named(disk).content = Bytes(bytes(4096))  # type: ignore[union-attr]  # it is there
    before = len(verity.machine.seen.said)
    with pytest.raises(KernelError, match=f"{disk} ends at byte 4096") as caught:
        verity.read(4096, 1)
    assert caught.value.errno == errno.EIO
    assert verity.machine.seen.said[before:] == told
    assert verity.status() == b"V -"


def test_corruption_is_no_read_error(verity: Verity) -> None:
    """io->had_mismatch keeps it from what is to be done on errors."""
    verity.disk("vda").data[0] ^= 1
    verity.create(b"panic_on_error")
    with pytest.raises(CorruptedError):
        verity.read(0, 1)
    assert verity.machine.seen.said[-1] == "!root eio"


def test_a_wrong_root_hash_and_another_image(verity: Verity, tmp_path: Path) -> None:
    """As on the kernel, the device can be made, and nothing read."""
    verity.create(w8=bytes(32).hex().encode())
    with pytest.raises(CorruptedError, match="root hash is"):
        verity.read(0, 1)
    verity.machine.call(Command.DEV_REMOVE, name=b"root")
    verity.machine.vdb.content = Bytes(made(tmp_path / "other", seed=4)[1])
    verity.create()
    with pytest.raises(CorruptedError, match="root hash is"):
        verity.read(0, 1)


def test_blocks_of_zeros(verity: Verity) -> None:
    verity.disk("vda").data[5 * 4096] = 1
    verity.create(b"ignore_zero_blocks")
    assert verity.read(5 * 4096, 4096) == bytes(4096)
    assert verity.status() == b"V -"


def test_all_options_are_shown_in_the_kernels_order(verity: Verity) -> None:
    verity.machine.caller.keys[b"sig"] = b"\x30"
    verity.machine.caller.signed.add((verity.root_hash.hex().encode(), b"\x30"))
    assert verity.create(
        b"root_hash_sig_key_desc", b"sig", b"Check_At_Most_Once", b"try_verify_in_tasklet", b"restart_on_error",
        b"ignore_zero_blocks", b"panic_on_corruption",
    ).errno == 0  # fmt: skip
    assert verity.table().endswith(
        b" 7 panic_on_corruption restart_on_error ignore_zero_blocks check_at_most_once try_verify_in_tasklet"
        b" root_hash_sig_key_desc sig"
    )
    assert verity.facts.dmverity_signature


def test_signatures(image: tuple[bytes, bytes, bytes]) -> None:
    verity = verity_of(image)
    option = (b"root_hash_sig_key_desc", b"sig")
    assert verity.create(*option).errno == errno.ENOKEY
    verity.machine.caller.keys[b"sig"] = b"\x30"
    assert verity.create(*option).errno == errno.EKEYREJECTED
    upper = verity.root_hash.hex().upper().encode()
    verity.machine.caller.signed.add((verity.root_hash.hex().encode(), b"\x30"))
    assert verity.create(*option, w8=upper).errno == errno.EKEYREJECTED  # what is signed is the text in the table
    assert not verity.facts.dmverity_signature
    assert verity.create(*option).errno == 0
    assert verity.facts.dmverity_signature


def test_a_signature_can_be_required(image: tuple[bytes, bytes, bytes]) -> None:
    verity = verity_of(image, require_signatures=True)
    assert verity.create().errno == errno.ENOKEY
    verity.machine.caller.keys[b"sig"] = b"\x30"
    verity.machine.caller.signed.add((verity.root_hash.hex().encode(), b"\x30"))
    assert verity.create(b"root_hash_sig_key_desc", b"sig").errno == 0


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"w0": b"2"}, errno.EINVAL),
        ({"w0": b"01"}, 0),
        ({"w0": b"4294967297"}, 0),  # sscanf() keeps 32 bits
        ({"w0": b"1x"}, errno.EINVAL),
        ({"w1": b"/dev/vdc"}, errno.ENOENT),
        ({"w2": b"254:99"}, errno.ENXIO),
        ({"w3": b"0"}, errno.EINVAL),
        ({"w3": b"256"}, errno.EINVAL),
        ({"w3": b"8192"}, errno.EINVAL),
        ({"w3": b"4095"}, errno.EINVAL),
        ({"w4": b"3"}, errno.EINVAL),
        ({"w4": b"4294967295"}, errno.EINVAL),
        ({"w4": b"1024", "w6": b"4"}, 0),
        ({"w5": b"-1"}, errno.EINVAL),
        ({"w5": b"59"}, errno.EINVAL),
        ({"w5": b"18446744073709551615"}, errno.EINVAL),
        ({"w5": b"1000000"}, errno.E2BIG),
        ({"w6": b"2"}, errno.E2BIG),
        ({"w6": b"2305843009213693952"}, errno.EINVAL),
        ({"w7": b"sha257"}, errno.ENOENT),
        ({"w7": b"SHA256"}, errno.ENOENT),
        ({"w7": b"sha512"}, errno.EINVAL),
        ({"w8": b"ab" * 31}, errno.EINVAL),
        ({"w8": b"xy" * 32}, errno.EINVAL),
        ({"w9": b"abc"}, errno.EINVAL),
        ({"w9": b"zz"}, errno.EINVAL),
        ({"length": BLOCKS * 8 + 8}, errno.EINVAL),
        ({"length": BLOCKS * 8 - 8}, 0),
        ({"length": 9}, errno.EINVAL),  # not a whole number of blocks
        ({"flags": 0}, errno.EINVAL),
    ],
)
def test_arguments(verity: Verity, changed: dict[str, Any], error: int) -> None:
    assert verity.create(**changed).errno == error
    assert verity.machine.devices.claims(verity.machine.vda) == (0 if error else 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([b"unknown"], errno.EINVAL),
        ([b"ignore_corruption", b"restart_on_corruption"], errno.EINVAL),
        ([b"panic_on_error", b"restart_on_error"], errno.EINVAL),
        ([b"root_hash_sig_key_desc"], errno.EINVAL),
        ([b"ignore_zero_blocks"] * 15, 0),
        ([b"ignore_zero_blocks"] * 16, errno.EINVAL),
    ],
)
def test_options(verity: Verity, options: list[bytes], error: int) -> None:
    assert verity.create(*options).errno == error


@pytest.mark.parametrize("end", [b"x", b"2 ignore_zero_blocks", b"-1", b"17 a"])
def test_numbers_of_options(verity: Verity, end: bytes) -> None:
    line = b" ".join([*verity.words, end])
    assert verity.machine.create(b"root", (0, 480, b"verity", line)).errno == errno.EINVAL


def test_what_stands_behind_the_options_is_not_looked_at(verity: Verity) -> None:
    line = b" ".join([*verity.words, b"0 whatever"])
    assert verity.machine.create(b"root", (0, 480, b"verity", line)).errno == 0


def test_too_few_arguments(verity: Verity) -> None:
    line = b" ".join(verity.words[:9])
    assert verity.machine.create(b"root", (0, 480, b"verity", line)).errno == errno.EINVAL


@pytest.mark.parametrize("option", [b"use_fec_from_device", b"fec_roots"])
def test_forward_error_correction_is_refused(verity: Verity, option: bytes) -> None:
    with pytest.raises(NotJudgedError, match="cannot be corrected"):
        verity.create(option, b"/dev/vdb")
    assert verity.machine.devices.claims(verity.machine.vda) == 0


@pytest.mark.parametrize(
    "changed", [{"w7": b"sha256-avx2"}, {"w7": b"hmac(sha256)"}, {"w4": b"1048576", "w6": b"0"}, {"w9": b"ab" * 257}]
)
def test_what_a_kernel_may_have_and_we_have_not(verity: Verity, changed: dict[str, Any]) -> None:
    with pytest.raises(NotJudgedError, match="verity"):
        verity.create(**changed)


def test_a_verity_device_is_alone_and_stays_one(verity: Verity) -> None:
    line = b" ".join(verity.words)
    two = ((0, 480, b"verity", line), (480, 8, b"zero", b""))
    assert verity.machine.create(b"root", *two).errno == errno.EINVAL
    assert verity.machine.create(b"root", (0, 8, b"zero", b""), (8, 480, b"verity", line)).errno == errno.EINVAL
    verity.create()
    assert verity.machine.load(b"root", (0, 8, b"zero", b"")).errno == errno.EINVAL
    assert verity.machine.load(b"root", (0, 480, b"verity", line)).errno == 0
    assert verity.machine.load(b"root", (0, 8, b"error", b"")).errno == 0


def test_a_linear_device_on_it_has_no_facts(verity: Verity) -> None:
    verity.create()
    assert verity.machine.create(b"upper", (0, 480, b"linear", b"253:0 0")).errno == 0
    upper = verity.machine.devices.named("dm-1")
    assert upper is not None
    assert upper.facts == NO_FACTS
    assert upper.read(0, 4096) == verity.disk("vda").data[:4096]


def test_a_short_hash_device_that_is_found_when_it_is_read(verity: Verity) -> None:
    verity.create()
    verity.machine.vdb.content = Bytes(bytes(verity.disk("vdb").data[:4096]))
    with pytest.raises(KernelError, match="vdb ends at byte 4096") as caught:
        verity.read(0, 1)
    assert caught.value.errno == errno.EIO


def test_mutated_lines(verity: Verity) -> None:
    """Only what the kernel answers to such a line, and whatever is opened is given back."""
    seeds = random.Random(11)
    known = [b"ignore_zero_blocks", b"check_at_most_once", b"root_hash_sig_key_desc", b"k", b"1", b"2", b"0", b"-"]
    allowed = {0, errno.EINVAL, errno.E2BIG, errno.ENOENT, errno.ENXIO, errno.ENOKEY, errno.EOVERFLOW}
    for _ in range(3000):
        words = list(verity.words)
        for _ in range(seeds.randint(0, 2)):
            words.insert(seeds.randrange(len(words) + 1), seeds.choice(known))
        line = bytearray(b" ".join(words))
        for _ in range(seeds.randint(0, 2)):
            line[seeds.randrange(len(line))] = seeds.choice(b"0123456789abf -:\\\xa0/")
        try:
            found = verity.machine.create(b"root", (0, 480, b"verity", bytes(line)))
        except NotJudgedError:
            verity.machine.call(Command.DEV_REMOVE, name=b"root")
            continue
        assert found.errno in allowed
        if not found.errno:
            assert verity.machine.call(Command.DEV_REMOVE, name=b"root").errno == 0
        assert verity.machine.devices.claims(verity.machine.vda) == 0
