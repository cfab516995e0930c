"""Opening volumes: what is accepted, and every way in which one can be wrong."""

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.profiles import PROFILES
from ipe_emu.volumes.image import VerifiedImage, open_verified
from ipe_emu.volumes.recognise import Kind
from ipe_emu.volumes.specification import VolumeSpecification, parse
from tests.integrity.tools import tool
from tests.vectors import KEYS
from tests.volumes.images import BLOCK, Volume, make_image, make_volume, protect, tamper

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tree")
    (directory / "file").write_bytes(b"content" * 100_000)
    return directory


@pytest.fixture(params=list(Kind))
def volume(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Volume:
    return make_volume(request.param, tree, tmp_path)


@pytest.fixture
def squashfs(tree: Path, tmp_path: Path) -> Volume:
    return make_volume(Kind.SQUASHFS, tree, tmp_path)


@pytest.fixture(autouse=True)
def _descriptors_closed() -> Iterator[None]:
    """A volume's images stay open as long as the process lives; here that is the test."""
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    yield
    for name in {path.name for path in Path("/proc/self/fd").iterdir()} - before:
        with contextlib.suppress(OSError):  # that of the listing itself
            os.close(int(name))


def opened(volume: Volume, *more: str) -> VerifiedImage:
    return open_verified(parse(volume.option("/mnt", *more)))


def refusal(specification: VolumeSpecification) -> str:
    with pytest.raises(UserError) as raised:
        open_verified(specification)
    return str(raised.value)


def test_what_is_known_of_it(volume: Volume) -> None:
    image = opened(volume)
    assert image.kind is volume.kind
    assert image.read(0, 1 << 30) == volume.image.read_bytes()
    assert image.size == volume.image.stat().st_size
    assert image.facts == Facts(dmverity_roothash=Digest("sha256", bytes.fromhex(volume.root_hash)))
    image.verify()


def test_hash_area_behind_the_data_and_no_superblock(squashfs: Volume) -> None:
    size = squashfs.image.stat().st_size
    done = tool(
        "veritysetup", "format", "--no-superblock", f"--hash-offset={size}", f"--data-blocks={size // BLOCK}",
        "--salt=0102", "--hash=sha512", squashfs.image, squashfs.image,
    )  # fmt: skip
    root_hash = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash:"))
    text = f"/mnt={squashfs.image},roothash={root_hash},hash-offset={size},no-superblock,salt=0102,algorithm=sha512"
    image = open_verified(parse(f"{text},data-blocks={size // BLOCK}"))
    assert image.size == size
    assert image.facts.dmverity_roothash == Digest("sha512", bytes.fromhex(root_hash))


def test_a_wrong_root_hash_names_both(squashfs: Volume) -> None:
    wrong = "0" * 64
    said = refusal(parse(evolve(squashfs, root_hash=wrong).option("/mnt")))
    assert squashfs.root_hash in said
    assert wrong in said
    assert "EIO" in said


def test_the_hash_image_of_another(squashfs: Volume, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_volume(Kind.SQUASHFS, tree, tmp_path / "other", salt=b"pepper")
    said = refusal(parse(evolve(squashfs, hash_image=other.hash_image).option("/mnt")))
    assert squashfs.root_hash in said
    assert other.root_hash in said


def test_one_tampered_block_fails_alone_and_is_told(squashfs: Volume) -> None:
    tamper(squashfs.image, 20 * BLOCK + 7)
    image = opened(squashfs)
    told: list[str] = []
    image.on_corruption = told.append
    assert image.read(0, 20 * BLOCK) == squashfs.image.read_bytes()[: 20 * BLOCK]
    for offset, length in ((20 * BLOCK, 1), (19 * BLOCK, 2 * BLOCK), (0, 1 << 30)):
        with pytest.raises(KernelError) as raised:
            image.read(offset, length)
        assert raised.value.errno == errno.EIO
    assert len(told) == 3
    assert all("data block 20 " in line for line in told)
    with pytest.raises(UserError, match="data block 20 "):
        image.verify()


def test_a_tampered_first_block_cannot_be_mounted(squashfs: Volume) -> None:
    tamper(squashfs.image, 100)
    assert re.search(r"cannot be mounted: data block 0 .* EIO", refusal(parse(squashfs.option("/mnt"))))


@pytest.mark.parametrize(
    ("which", "size", "message"),
    [
        ("image", 0, "the image has 0 bytes"),
        ("image", 5 * BLOCK, f"the image has {5 * BLOCK} bytes"),
        ("hash_image", 0, "no superblock: 0 bytes"),
        ("hash_image", 600, "the hash image has 600 bytes"),
    ],
)
def test_truncated_images(squashfs: Volume, which: str, size: int, message: str) -> None:
    os.truncate(getattr(squashfs, which), size)
    assert message in refusal(parse(squashfs.option("/mnt")))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"XFSB", "XFS"),
        (b"\0" * 32769 + b"CD001", "ISO 9660"),
        (b"\0" * 510 + b"\x55\xaa", "a disk with partitions, or FAT"),
        (b"", "at its beginning zeros"),
        (b"hello", "something that begins with 68656c6c6f000000"),
    ],
)
def test_what_holds_no_known_file_system(tmp_path: Path, content: bytes, name: str) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(content.ljust(10 * BLOCK, b"\0"))
    said = refusal(parse(protect(Kind.SQUASHFS, image).option("/mnt")))
    assert f"holds no squashfs, ext4 or erofs file system, but {name}" in said


def test_ext4_that_a_kernel_would_not_mount(tree: Path, tmp_path: Path) -> None:
    """Blocks that are smaller than the device's, a journal to be recovered, a file system that is larger than all."""
    small = tmp_path / "small.img"
    assert tool("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", tree, small, "8M").returncode == 0
    assert "its blocks have 1024 bytes" in refusal(parse(protect(Kind.EXT4, small).option("/mnt")))

    dirty = make_image(Kind.EXT4, tree, tmp_path / "dirty.img")
    with dirty.open("r+b") as stream:
        stream.seek(1024 + 96)
        features = int.from_bytes(stream.read(4), "little")
        stream.seek(1024 + 96)
        stream.write((features | 4).to_bytes(4, "little"))
    said = refusal(parse(protect(Kind.EXT4, dirty).option("/mnt")))
    assert "its journal needs recovery" in said
    assert "EROFS" in said

    cut = make_image(Kind.EXT4, tree, tmp_path / "cut.img")
    os.truncate(cut, 1 << 20)
    assert "bad geometry: block count 4096 exceeds size of device (256 blocks)" in refusal(
        parse(protect(Kind.EXT4, cut).option("/mnt"))
    )


def test_squashfs_that_is_cut_before_its_hash_tree_is_made(squashfs: Volume) -> None:
    os.truncate(squashfs.image, 10 * BLOCK)
    squashfs.hash_image.unlink()
    said = refusal(parse(protect(Kind.SQUASHFS, squashfs.image).option("/mnt")))
    assert f"and the image has {10 * BLOCK}" in said


def test_erofs_with_a_wrong_checksum(tree: Path, tmp_path: Path) -> None:
    image = make_image(Kind.EROFS, tree, tmp_path / "erofs.img")
    tamper(image, 1024 + 100)
    said = refusal(parse(protect(Kind.EROFS, image).option("/mnt")))
    assert re.search("invalid checksum 0x[0-9a-f]{8}, 0x[0-9a-f]{8} expected .*EBADMSG", said)


def test_data_blocks_that_no_kernel_maps(squashfs: Volume) -> None:
    done = tool("veritysetup", "format", "--data-block-size=8192", squashfs.image, squashfs.hash_image)
    root_hash = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash:"))
    assert "data blocks of 8192 bytes" in refusal(parse(evolve(squashfs, root_hash=root_hash).option("/mnt")))


@pytest.mark.parametrize(("name", "why"), [("gone", "No such file or directory"), (".", "neither a regular file")])
def test_images_that_are_none(squashfs: Volume, tmp_path: Path, name: str, why: str) -> None:
    assert why in refusal(parse(evolve(squashfs, image=tmp_path / name).option("/mnt")))
    assert why in refusal(parse(evolve(squashfs, hash_image=tmp_path / name).option("/mnt")))


def signature(content: str, place: Path, signer: str = "trusted") -> Path:
    data, path = place / "content", place / "hash.p7s"
    data.write_text(content)
    subprocess.run(
        ["openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-in", data, "-inkey", KEYS / f"{signer}.key",
         "-signer", KEYS / f"{signer}.pem", "-outform", "der", "-out", path],
        check=True, timeout=20, capture_output=True,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kernel", ["linux-6.12", "linux-7.3"])
def test_signatures(squashfs: Volume, tmp_path: Path, kernel: str) -> None:
    keyrings = Keyrings(builtin=load_certificates([KEYS / "builtin-trusted.pem"]))

    def verified(path: Path) -> bool:
        image = opened(squashfs, f"signature={path}")
        assert not image.facts.dmverity_signature
        image.verify_signature(keyrings, PROFILES[kernel])
        return image.facts.dmverity_signature

    assert verified(signature(squashfs.root_hash, tmp_path))
    for content, signer, answer in (
        (squashfs.root_hash, "untrusted", "ENOKEY"),
        (squashfs.root_hash + "\n", "trusted", "EKEYREJECTED"),
        (squashfs.root_hash.upper(), "trusted", "EKEYREJECTED"),
        ("0" * 64, "trusted", "EKEYREJECTED"),
    ):
        with pytest.raises(
            UserError, match=f"signature of the root hash of .*the kernel makes no such volume: {answer}"
        ):
            verified(signature(content, tmp_path, signer))
    (tmp_path / "hash.p7s").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="p7s: signature of the root"):
        verified(tmp_path / "hash.p7s")
    with pytest.raises(UserError, match="No such file"):
        verified(tmp_path / "gone")
    unsigned = opened(squashfs)
    unsigned.verify_signature(keyrings, PROFILES[kernel])
    assert not unsigned.facts.dmverity_signature
