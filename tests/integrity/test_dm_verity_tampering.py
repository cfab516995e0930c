"""What is not as the root hash says is found: single bits anywhere, and images that lie."""

import os
import random
import resource
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attrs import evolve, frozen

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.dm_verity import (
    CorruptedError,
    DmVerity,
    Parameters,
    Superblock,
    compute_root_hash,
    format_image,
    parse_root_hash,
)
from tests.integrity.tools import IDENTITY, open_formatted, opened, random_file, tool

SAMPLES = 1000
#: 600 blocks of 512 bytes: three levels, the last hash block of each partly filled.
PARAMETERS = Parameters(600, data_block_size=512, hash_block_size=512, salt=bytes(range(1, 33)))
UUID_BYTES = range(16, 32)


@frozen
class Image:
    data: Path
    hash_image: Path
    root_hash: bytes

    def volume(self, data_fd: int, hash_fd: int) -> DmVerity:
        return open_formatted(self.root_hash, data_fd, hash_fd)

    def verify(self) -> None:
        with opened(self.data) as data_fd, opened(self.hash_image) as hash_fd:
            self.volume(data_fd, hash_fd).verify()


def make(place: Path, parameters: Parameters, seed: int = 0) -> Image:
    place.mkdir(exist_ok=True)
    data, hash_image = random_file(place / "data", parameters.data_size + seed), place / "hash"
    hash_image.touch()
    with opened(data) as data_fd, opened(hash_image, os.O_RDWR) as hash_fd:
        return Image(data, hash_image, format_image(data_fd, hash_fd, parameters, 0, identity=IDENTITY))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make(tmp_path / "image", PARAMETERS)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_bit_counts(image: Image) -> None:
    """Of data, tree, superblock (but its UUID, which only names the image) and root hash, a sample of each run."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    image.verify()
    places = [(image.data, range(PARAMETERS.data_size))]
    places += [(image.hash_image, range(512, image.hash_image.stat().st_size))] * 2
    places += [(image.hash_image, [n for n in range(512) if n not in UUID_BYTES])] * 2  # type: ignore[list-item]  # mixed
    for _ in range(SAMPLES):
        path, where = rng.choice(places)
        bit = rng.choice(where) * 8 + rng.randrange(8)
        flip(path, bit)
        try:
            image.verify()
        except (UserError, CorruptedError):
            flip(path, bit)
        else:
            pytest.fail(f"seed {seed}: bit {bit} of {path.name} counts for nothing")
    for bit in range(256):
        root_hash = (int.from_bytes(image.root_hash) ^ 1 << bit).to_bytes(32)
        with pytest.raises(CorruptedError, match="another image's"):
            evolve(image, root_hash=root_hash).verify()
    image.verify()


def test_every_bit_of_the_superblock_counts(image: Image) -> None:
    for bit in range(512 * 8):
        flip(image.hash_image, bit)
        if bit // 8 in UUID_BYTES:
            image.verify()
        else:
            with pytest.raises((UserError, CorruptedError)):
                image.verify()
        flip(image.hash_image, bit)


def test_the_first_bad_block_is_named(image: Image) -> None:
    flip(image.data, (77 * 512 + 3) * 8)
    flip(image.data, (400 * 512) * 8)
    with pytest.raises(CorruptedError, match=r"data block 77 \(at byte 39424\)") as caught:
        image.verify()
    assert (caught.value.level, caught.value.block, caught.value.name) == (None, 77, "EIO")


def test_a_bad_hash_block_is_told_from_bad_data(image: Image) -> None:
    offsets = PARAMETERS.level_offsets(512)
    assert len(offsets) == 3
    flip(image.hash_image, (offsets[0] + 5 * 512 + 100) * 8)
    with pytest.raises(CorruptedError, match="hash block 5 of level 0") as caught:
        image.verify()
    assert (caught.value.level, caught.value.block) == (0, 5)


def test_reading_fails_for_the_bad_block_alone(image: Image) -> None:
    flip(image.data, (77 * 512 + 3) * 8)
    content = image.data.read_bytes()
    with opened(image.data) as data_fd, opened(image.hash_image) as hash_fd:
        volume = image.volume(data_fd, hash_fd)
        for number in range(PARAMETERS.data_blocks):
            if number == 77:
                with pytest.raises(CorruptedError):
                    volume.read_block(number)
            else:
                assert volume.read_block(number) == content[number * 512 :][:512]
        assert volume.read(76 * 512 - 5, 517) == content[76 * 512 - 5 : 77 * 512]
        with pytest.raises(CorruptedError):
            volume.read(76 * 512, 513)
        assert volume.read(78 * 512, 1 << 40) == content[78 * 512 : PARAMETERS.data_size]
        assert volume.read(PARAMETERS.data_size, 10) == b""
        with pytest.raises(IndexError):
            volume.read_block(PARAMETERS.data_blocks)
        with pytest.raises(CorruptedError):
            volume.verify_block(0, volume.read_block(1))


def test_a_bad_hash_block_spoils_what_is_below_it(image: Image) -> None:
    offsets = PARAMETERS.level_offsets(512)
    flip(image.hash_image, (offsets[1] + 40) * 8)  # the first block of the middle level: 256 data blocks
    with opened(image.data) as data_fd, opened(image.hash_image) as hash_fd:
        volume = image.volume(data_fd, hash_fd)
        volume.read_block(256)
        for number in (0, 100, 255):
            with pytest.raises(CorruptedError, match="hash block 0 of level 1") as caught:
                volume.read_block(number)
            assert caught.value.name == "EIO"


def test_a_verified_hash_block_is_kept_and_others_are_not(image: Image) -> None:
    with opened(image.data) as data_fd, opened(image.hash_image) as hash_fd:
        volume = image.volume(data_fd, hash_fd)
        volume.read_block(0)
        image.hash_image.write_bytes(bytes(image.hash_image.stat().st_size))
        volume.read_block(1)
        with pytest.raises(CorruptedError):
            volume.read_block(300)


def test_the_tree_of_another_image(image: Image, tmp_path: Path) -> None:
    other = make(tmp_path / "other", PARAMETERS, seed=1)
    with pytest.raises(CorruptedError, match=f"root hash is {other.root_hash.hex()}, not {image.root_hash.hex()}"):
        evolve(image, hash_image=other.hash_image).verify()
    with pytest.raises(CorruptedError, match="data block 0 "):
        evolve(other, data=image.data).verify()


def test_fewer_blocks_than_the_tree_has(image: Image) -> None:
    """A kernel would map a shorter device; veritysetup verify does not like what is behind it, nor do we."""
    shorter = evolve(PARAMETERS, data_blocks=599)
    with image.hash_image.open("r+b") as file:
        file.write(Superblock(shorter, IDENTITY).pack())
    with pytest.raises(CorruptedError, match="data where zeros belong"):
        image.verify()
    assert tool("veritysetup", "verify", image.data, image.hash_image, image.root_hash.hex()).returncode != 0


@pytest.mark.parametrize("which", ["data", "hash_image"])
@pytest.mark.parametrize("cut", [1, 512, 10_000])
def test_cut_images(image: Image, which: str, cut: int) -> None:
    path: Path = getattr(image, which)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(UserError, match=f"image has {path.stat().st_size} bytes"):
        image.verify()


@pytest.mark.parametrize("size", [0, 1, 511])
def test_cut_superblocks(image: Image, size: int) -> None:
    os.truncate(image.hash_image, size)
    with pytest.raises(UserError, match=f"no superblock: {size} bytes"):
        image.verify()


GOOD = Superblock(PARAMETERS, IDENTITY).pack()


def patched(offset: int, value: bytes) -> bytes:
    return GOOD[:offset] + value + GOOD[offset + len(value) :]


@pytest.mark.parametrize(
    ("superblock", "complaint"),
    [
        (patched(0, b"Verity"), "signature is b'Verity"),
        (patched(8, struct.pack("<I", 2)), "version is 2"),
        (patched(12, struct.pack("<I", 7)), "hash type is 7"),
        (patched(32, b"sha257"), "hash algorithm is 'sha257'"),
        (patched(32, b"SHA256"), "a kernel calls it 'sha256'"),
        (patched(32, b"blake2b512\0"), "a kernel calls it 'blake2b-512'"),
        (patched(32, b"\0"), "unused bytes behind algorithm"),
        (patched(32, b"a" * 32), "a name without end"),
        (patched(32, b"\xff\n\x1b[m\0\0"), r"hash algorithm is 'ÿ\\n\\x1b\[m'"),
        (patched(64, struct.pack("<I", 0)), "data block size is 0"),
        (patched(64, struct.pack("<I", 4095)), "data block size is 4095"),
        (patched(64, struct.pack("<I", 256)), "data block size is 256"),
        (patched(64, struct.pack("<I", 1 << 31)), "data block size is 2147483648"),
        (patched(68, struct.pack("<I", 1 << 20)), "hash block size is 1048576"),
        (patched(72, struct.pack("<Q", 0)), "number of data blocks is 0"),
        (patched(72, struct.pack("<Q", (1 << 64) - 1)), "number of data blocks is 18446744073709551615"),
        (patched(72, struct.pack("<Q", 1 << 50)), "number of data blocks is 1125899906842624"),
        (patched(80, struct.pack("<H", 257)), "salt size is 257"),
        (patched(80, struct.pack("<H", 65535)), "salt size is 65535"),
        (patched(80, struct.pack("<H", 10)), "unused bytes behind salt"),
        (patched(84, b"x"), "unused bytes behind salt size"),
        (patched(511, b"x"), "unused bytes behind all fields"),
    ],
)
def test_superblocks_that_lie(image: Image, superblock: bytes, complaint: str) -> None:
    with image.hash_image.open("r+b") as file:
        file.write(superblock)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(UserError, match=complaint):
        image.verify()
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10_000  # KiB


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "0 digits, and sha256 has 64"),
        ("ab" * 31, "62 digits"),
        ("ab" * 32 + "a", "65 digits"),
        ("AB" * 32, "lower case: " + "ab" * 32),
        ("xy" * 32, "not hexadecimal"),
        (" " + "ab" * 32, "not hexadecimal"),
        ("ab" * 32 + "\n", "not hexadecimal"),
        ("\u0660" * 64, "not hexadecimal"),
        ("sha512:" + "ab" * 32, "made with sha256"),
        (":" + "ab" * 32, "made with sha256"),
    ],
)
def test_root_hashes_that_are_none(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        parse_root_hash(text, "sha256")
    assert repr(text)[1:-1] in str(caught.value)


def test_root_hashes(image: Image) -> None:
    assert parse_root_hash(image.root_hash.hex(), "sha256") == image.root_hash
    assert parse_root_hash("sha256:" + image.root_hash.hex(), "sha256") == image.root_hash
    with opened(image.data) as fd, pytest.raises(UserError, match="root hash has 31 bytes"):
        DmVerity(PARAMETERS, bytes(31), fd, fd, 0)


@pytest.mark.parametrize("offset", [-512, 1, 511, 1 << 63, 1 << 80])
def test_hash_offsets_that_are_none(image: Image, offset: int) -> None:
    with opened(image.data) as fd:
        with pytest.raises(UserError, match=f"hash offset is {offset}"):
            open_formatted(image.root_hash, fd, fd, offset)
        with pytest.raises(UserError, match=f"hash offset is {offset}"):
            PARAMETERS.tree_offset(offset, superblock=False)


def test_an_image_that_is_cut_while_it_is_read(image: Image) -> None:
    with opened(image.data) as data_fd, opened(image.hash_image) as hash_fd:
        volume = image.volume(data_fd, hash_fd)
        os.truncate(image.data, 100 * 512)
        volume.read_block(99)
        with pytest.raises(KernelError, match="ends at byte 51200") as caught:
            volume.read_block(100)
        assert caught.value.name == "EIO"
        with pytest.raises((KernelError, UserError)):
            volume.verify()


def test_many_threads_read_one_volume(image: Image) -> None:
    content = image.data.read_bytes()[: PARAMETERS.data_size]
    flip(image.data, 300 * 512 * 8)
    with opened(image.data) as data_fd, opened(image.hash_image) as hash_fd:
        volume = image.volume(data_fd, hash_fd)

        def read(seed: int) -> list[int]:
            bad = []
            for number in random.Random(seed).sample(range(PARAMETERS.data_blocks), PARAMETERS.data_blocks):
                try:
                    block = volume.read_block(number)
                except CorruptedError as error:
                    bad.append(error.block)
                else:
                    assert block == content[number * 512 :][:512]
            return bad

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, range(8))) == [[300]] * 8


def test_a_single_block(tmp_path: Path) -> None:
    """Without a tree, the root hash is the block's digest."""
    image = make(tmp_path / "single", evolve(PARAMETERS, data_blocks=1))
    image.verify()
    flip(image.data, 9)
    with pytest.raises(CorruptedError, match="root hash is"):
        image.verify()
    with opened(image.data) as fd:
        computed = compute_root_hash(fd, evolve(PARAMETERS, data_blocks=1))
    assert computed != image.root_hash
