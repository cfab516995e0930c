"""Hash trees and superblocks against those that veritysetup makes and checks."""

import itertools
import os
from pathlib import Path

import pytest

from ipe_emu.errors import UserError
from ipe_emu.integrity.algorithms import ALGORITHMS
from ipe_emu.integrity.dm_verity import DmVerity, Parameters, compute_root_hash, format_image
from tests.integrity.tools import IDENTITY, open_formatted, opened, random_file, tool, veritysetup_format

#: What Debian's veritysetup has under the kernel's names.
COMMON = (
    "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sm3", "sha3-224", "sha3-256", "sha3-384", "sha3-512",
    "blake2b-512", "blake2s-256", "rmd160",
)  # fmt: skip
SALT = bytes(range(32))
LONG_SALT = bytes(range(256))


def compare(tmp_path: Path, size: int, parameters: Parameters) -> None:
    """Make the same hash image twice, and check each with the other program."""
    data = random_file(tmp_path / "data", size)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    expected = veritysetup_format(data, theirs, parameters, f"--uuid={IDENTITY}")
    ours.touch()
    with opened(data) as data_fd, opened(ours, os.O_RDWR) as hash_fd:
        root_hash = format_image(data_fd, hash_fd, parameters, 0, identity=IDENTITY)
        assert root_hash.hex() == expected
    assert ours.read_bytes() == theirs.read_bytes()
    with opened(data) as data_fd, opened(theirs) as hash_fd:
        volume = open_formatted(root_hash, data_fd, hash_fd)
        volume.verify()
        assert volume.read(0, size) == data.read_bytes()[: parameters.data_size]


@pytest.mark.parametrize("algorithm", COMMON)
@pytest.mark.parametrize("hash_type", [0, 1])
@pytest.mark.parametrize("salt", [b"", SALT], ids=["unsalted", "salted"])
def test_algorithms(tmp_path: Path, algorithm: str, hash_type: int, salt: bytes) -> None:
    compare(tmp_path, 300 * 512, Parameters(300, algorithm, hash_type, 512, 1024, salt))


@pytest.mark.parametrize("size", [4096, 4097, 8191, 8192, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 129 * 4096])
@pytest.mark.parametrize("salt", [b"", b"x", LONG_SALT], ids=["unsalted", "one byte", "256 bytes"])
def test_sizes(tmp_path: Path, size: int, salt: bytes) -> None:
    compare(tmp_path, size, Parameters(size // 4096, salt=salt))


@pytest.mark.parametrize("sizes", [*itertools.product((512, 4096, 65536, 524288), repeat=2)], ids=str)
@pytest.mark.parametrize("hash_type", [0, 1])
def test_block_sizes(tmp_path: Path, sizes: tuple[int, int], hash_type: int) -> None:
    data_block_size, hash_block_size = sizes
    blocks = (1 << 20) // data_block_size
    compare(tmp_path, 1 << 20, Parameters(blocks, "sha384", hash_type, data_block_size, hash_block_size, SALT))


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_less_than_a_block_is_no_image_for_either(tmp_path: Path, size: int) -> None:
    data = random_file(tmp_path / "data", size)
    assert tool("veritysetup", "format", data, tmp_path / "hash").returncode != 0
    with pytest.raises(UserError, match="number of data blocks is 0"):
        Parameters(size // 4096)
    with opened(data) as fd, pytest.raises(UserError, match=f"the image has {size} bytes"):
        compute_root_hash(fd, Parameters(1))


@pytest.mark.parametrize("offset", [0, 512, 4096, 10240, 1 << 20])
@pytest.mark.parametrize("superblock", [True, False])
@pytest.mark.parametrize("one_image", [True, False])
def test_offsets(tmp_path: Path, offset: int, superblock: bool, one_image: bool) -> None:
    parameters = Parameters(200, "sha512", salt=SALT)
    images = []
    for name in ("theirs", "ours"):
        data = random_file(tmp_path / name, parameters.data_size)
        images.append((data, data if one_image else tmp_path / f"{name}.hash"))
    where = offset + (parameters.data_size if one_image else 0)
    (their_data, theirs), (our_data, ours) = images
    options = [f"--hash-offset={where}", "--data-blocks=200", f"--uuid={IDENTITY}"]
    options += [] if superblock else ["--no-superblock"]
    expected = veritysetup_format(their_data, theirs, parameters, *options)
    ours.touch()
    identity = IDENTITY if superblock else None
    with opened(our_data) as data_fd, opened(ours, os.O_RDWR) as hash_fd:
        root_hash = format_image(data_fd, hash_fd, parameters, where, identity=identity)
    assert root_hash.hex() == expected
    assert ours.read_bytes() == theirs.read_bytes()
    with opened(their_data) as data_fd, opened(theirs) as hash_fd:
        tree = parameters.tree_offset(where, superblock=superblock)
        DmVerity(parameters, root_hash, data_fd, hash_fd, tree).verify()
    options += [f"--salt={SALT.hex()}", "--hash=sha512"] if not superblock else []
    assert tool("veritysetup", "verify", *options[:2], *options[3:], our_data, ours, expected).returncode == 0


def test_an_error_correction_area_is_not_looked_at(tmp_path: Path) -> None:
    parameters = Parameters(256, salt=SALT)
    image = random_file(tmp_path / "image", parameters.data_size)
    hash_end = parameters.tree_offset(parameters.data_size, superblock=True) + parameters.tree_size
    expected = veritysetup_format(
        image, image, parameters, f"--hash-offset={parameters.data_size}", "--data-blocks=256",
        f"--fec-device={image}", f"--fec-offset={hash_end}", "--fec-roots=2",
    )  # fmt: skip
    assert image.stat().st_size > hash_end
    with opened(image) as fd:
        open_formatted(bytes.fromhex(expected), fd, fd, parameters.data_size).verify()


def test_data_and_hash_area_must_not_overlap(tmp_path: Path) -> None:
    image = random_file(tmp_path / "image", 1 << 20)
    before = image.read_bytes()
    with opened(image, os.O_RDWR) as fd, pytest.raises(UserError, match="hash offset is 4096"):
        format_image(fd, fd, Parameters(256), 4096, identity=IDENTITY)
    assert image.read_bytes() == before


def test_a_gibibyte_of_nothing(tmp_path: Path) -> None:
    """veritysetup (2.6.1, Debian) printed this hash for the same file."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 1 << 30)
    with opened(image) as fd:
        root_hash = compute_root_hash(fd, Parameters(1 << 18), jobs=2)
    assert root_hash.hex() == "e3153814e4aabfa16df46f9e50685b46dc614ea11c0270eff25dfa8253ed94f0"


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(COMMON)))
def test_what_veritysetup_lacks_and_kernels_may_have(tmp_path: Path, name: str) -> None:
    """No second opinion here: the tree must at least have digests of the size in its name, and verify."""
    parameters = Parameters(40, name, data_block_size=512, hash_block_size=512, salt=SALT)
    assert parameters.digest_size * 8 == int(name.rpartition("-")[2])
    data, hash_image = random_file(tmp_path / "data", 40 * 512), tmp_path / "hash"
    hash_image.touch()
    with opened(data) as data_fd, opened(hash_image, os.O_RDWR) as hash_fd:
        root_hash = format_image(data_fd, hash_fd, parameters, 0, identity=IDENTITY)
        open_formatted(root_hash, data_fd, hash_fd).verify()
