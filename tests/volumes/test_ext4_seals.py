"""Sealed files of ext4 images: what kernels answered for them, byte for byte, and images that mean harm."""

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.fsverity_signature import verify_signature
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.volumes.ext4_seals import SealedFiles
from tests import vectors
from tests.integrity.tools import tool
from tests.volumes import sealed_images
from tests.volumes.sealed_images import BLOCK_SIZES, FILES, regions

pytestmark = pytest.mark.timeout(60)

KEYRINGS = Keyrings(fsverity=load_certificates([vectors.KEYS / "trusted.pem"]))
#: Numbers of inodes that the kernel could not open at any time.
STRANGERS = {1024: 16, 4096: 17}


def find(image: bytes) -> SealedFiles:
    return SealedFiles.find(lambda offset, length: image[offset : offset + length], len(image))


def patched(image: bytes, *patches: tuple[int, bytes]) -> bytes:
    changed = bytearray(image)
    for position, value in patches:
        changed[position : position + len(value)] = value
    return bytes(changed)


def answer(found: SealedFiles, inode: int) -> dict[str, Any]:
    """What a kernel would answer, in the words of the recording."""
    sealed = found.by_inode.get(inode)
    if sealed is None:
        return {"open": 0, "measure": {"error": "ENODATA" if found.file_system.has_verity else "ENOTSUP"}}
    if sealed.fault is not None:
        return {"open": sealed.fault.name}
    assert sealed.seal is not None
    if sealed.seal.signature:
        try:
            verify_signature(sealed.seal.digest, sealed.seal.signature, KEYRINGS)
        except KernelError as error:
            return {"open": error.name}
    if sealed.damage is not None:
        return {"open": 0, "read": {"error": sealed.damage.name}}
    if not found.file_system.has_verity:
        return {"open": 0, "measure": {"error": "ENOTSUP"}}
    return {"open": 0, "measure": str(sealed.seal.digest)}


def recorded(file: dict[str, Any]) -> dict[str, Any]:
    if file["open"]:
        return {"open": file["open"]}
    return {"open": 0, **({"read": file["read"]} if isinstance(file["read"], dict) else {"measure": file["measure"]})}


@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_every_answer_is_the_kernels(kernel: str) -> None:
    unchanged: dict[str, Any] = {}
    faults = 0
    for line in vectors.load(kernel, "ext4-seals"):
        assert line["mount"] is None
        if not line["patches"]:
            unchanged = line["files"]
        changes = [(position, bytes.fromhex(value)) for position, value in line["patches"]]
        found = find(patched(sealed_images.image(line["image"]), *changes))
        for name, file in unchanged.items():
            inode = STRANGERS[line["image"]] if name == "stranger" else file["inode"]
            want = recorded(line["files"].get(name, file))
            assert answer(found, inode) == want, (line["image"], line["patches"], name)
            faults += want != recorded(file)
    assert faults > 200


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_the_digests_are_those_of_the_contents(size: int) -> None:
    found = find(sealed_images.image(size))
    digests = {str(file.digest()): file for file in FILES.values() if file.is_sealed and file.block_size <= size}
    assert {str(sealed.seal and sealed.seal.digest) for sealed in found.by_inode.values()} == set(digests)
    for sealed in found.by_inode.values():
        assert sealed.seal is not None
        assert bool(sealed.seal.signature) == bool(digests[str(sealed.seal.digest)].signer)
        assert sealed.size == len(digests[str(sealed.seal.digest)].data)
    found.check()


@pytest.mark.parametrize(
    ("name", "position", "value", "said"),
    [
        ("inodes-per-group-1", 0x28, 1, "inodes per group is 1"),
        ("inode-size", 0x58, 0xFFFF, "inode size is 65535"),
        ("inodes-per-group", 0x28, 0xFFFFFFFF, "inodes per group is 4294967295"),
        ("inodes", 0x00, 0xFFFFFFFF, "number of inodes is 4294967295"),
        ("blocks", 0x04, 0xFFFFFFFF, "number of blocks is 4294967295"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_superblock_that_lies_is_not_judged(name: str, position: int, value: int, said: str) -> None:
    size = "<H" if name == "inode-size" else "<I"
    with pytest.raises(NotJudgedError, match=said):
        find(patched(sealed_images.image(1024), (1024 + position, struct.pack(size, value))))


def test_files_that_share_their_blocks_are_not_judged() -> None:
    """Or a small image could have more content than anybody can hash."""
    image = sealed_images.image(1024)
    inodes = sorted(position for position, _ in regions(image)["inode"])
    # 29 MiB of the image's first blocks, four times, in each of the files.
    extents = struct.pack("<HHHHI", 0xF30A, 4, 4, 0, 0)
    extents += b"".join(struct.pack("<IHHI", first * 4000, 4000, 0, 20) for first in range(4))
    with pytest.raises(NotJudgedError, match="several files"):
        find(patched(image, *((position + 0x28, extents) for position in inodes)))


def test_a_tree_of_extents_that_leads_back_to_itself_ends() -> None:
    image = sealed_images.image(1024)
    (index, _), *_ = regions(image)["index"]
    header = struct.pack("<HHHHI", 0xF30A, 1, 84, 3, 0) + struct.pack("<IIHH", 0, index // 1024, 0, 0)
    found = find(patched(image, (index, header)))
    (broken,) = [sealed for sealed in found.by_inode.values() if sealed.fault]
    assert broken.fault is not None
    assert broken.fault.errno == errno.EUCLEAN


def test_an_encrypted_file_is_not_judged() -> None:
    image = sealed_images.image(1024)
    position, _ = regions(image)["inode"][0]
    (flags,) = struct.unpack_from("<I", image, position + 0x20)
    with pytest.raises(NotJudgedError, match="encrypted"):
        find(patched(image, (position + 0x20, struct.pack("<I", flags | 0x800))))


def test_an_image_that_ends_early_cannot_be_read() -> None:
    image = sealed_images.image(1024)
    with pytest.raises((KernelError, NotJudgedError)):
        SealedFiles.find(lambda offset, length: image[: 1 << 14][offset : offset + length], len(image))


def test_an_inode_that_no_table_has_in_use_is_not_judged() -> None:
    found = find(sealed_images.image(4096))
    with pytest.raises(NotJudgedError, match="used parts"):
        found.of(os.stat_result((0o100755, 60, 1, 1, 0, 0, 0, 0, 0, 0)))


@pytest.mark.parametrize("options", [("-O", "meta_bg,^resize_inode"), ("-O", "^64bit,^metadata_csum"), ("-I", "128")])
def test_every_inode_is_looked_at_wherever_its_group_is(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In file systems of 70 groups, with their descriptors in one place or here and there."""
    path, empty = tmp_path / "image", tmp_path / "empty"
    empty.touch()
    made = tool("mke2fs", "-q", "-t", "ext4", "-b", 1024, "-g", 256, "-N", 70 * 8, *options, path, "17920k")
    assert made.returncode == 0, made.stderr
    commands = tmp_path / "commands"
    # Directories go to groups of their own; their files are there too.
    commands.write_text(
        "".join(f"mkdir {n}\nwrite {empty} {n}/file\nset_inode_field {n}/file flags 0x180000\n" for n in range(60))
    )
    assert tool("debugfs", "-w", "-f", commands, path).returncode == 0
    found = find(path.read_bytes())
    assert len(found.by_inode) == 60
    groups = {(number - 1) // 8 for number in found.by_inode}
    assert len(groups) > 5
    assert all(sealed.fault is not None and sealed.fault.errno == errno.EUCLEAN for sealed in found.by_inode.values())
    assert found.file_system.is_known(max(found.by_inode))
