"""ext4 images with sealed files, as a kernel made them (scripts/record_ext4_seals.py), and what is in them."""

import lzma
import struct
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from attrs import frozen

from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.fsverity import HASH_ALGORITHMS, measure
from ipe_emu.integrity.fsverity_signature import formatted_digest
from ipe_emu.pkcs7.sign import sign_detached
from ipe_emu.volumes.ext4 import Ext4, File
from tests import vectors
from tests.integrity.tools import opened

IMAGES = Path(vectors.__file__).parent
#: Of the file systems' blocks.
BLOCK_SIZES = (1024, 4096)
HELLO = b"#!/bin/sh\necho hello\n"


@frozen
class Content:
    """What is in one file; ``pieces`` are written each at its offset. ``signer`` names a key of the vectors."""

    pieces: tuple[tuple[int, bytes], ...]
    is_sealed: bool = True
    algorithm: str = "sha256"
    block_size: int = 1024
    salt: bytes = b""
    signer: str | None = None
    mode: int = 0o755

    @property
    def number(self) -> int:
        return HASH_ALGORITHMS[self.algorithm]

    @property
    def data(self) -> bytes:
        found = bytearray()
        for offset, piece in self.pieces:
            found += bytes(offset - len(found)) + piece
        return bytes(found)

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for offset, piece in self.pieces:
                file.seek(offset)
                file.write(piece)
                file.flush()
        path.chmod(self.mode)

    def digest(self) -> Digest:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "file"
            path.write_bytes(self.data)
            with opened(path) as fd:
                return measure(fd, self.algorithm, block_size=self.block_size, salt=self.salt)

    def signature(self) -> bytes:
        if self.signer is None:
            return b""
        key, certificate = ((vectors.KEYS / f"{self.signer}.{suffix}").read_bytes() for suffix in ("key", "pem"))
        return sign_detached(formatted_digest(self.digest()), key, certificate, digest="sha256")


def _counted(count: int) -> bytes:
    return b"".join(b"%1023d\n" % number for number in range(count))


FILES: Mapping[str, Content] = {
    "plain": Content(((0, HELLO),), is_sealed=False),
    "hello": Content(((0, HELLO),)),
    "other": Content(((0, b"#!/bin/sh\necho other\n"),), block_size=4096),
    "empty": Content(((0, b""),), mode=0o644),
    "signed": Content(((0, b"#!/bin/sh\necho signed\n"),), signer="trusted"),
    "stranger": Content(((0, b"#!/bin/sh\necho stranger\n"),), signer="untrusted"),
    "salted": Content(((0, _counted(70)),), algorithm="sha512", salt=b"salt of 18 bytes.."),
    "pages": Content(((0, _counted(520)),), block_size=4096),
    "directory/levels": Content(((0, _counted(60)),)),
    "pieces": Content(tuple((number * 8192, b"%d\n" % number) for number in range(9))),
    "hole": Content(((300_000, b"at the end"),)),
}


@cache
def image(block_size: int) -> bytes:
    """An image of the file system with blocks of this size."""
    return lzma.decompress((IMAGES / f"ext4-seals-{block_size}.img.xz").read_bytes())


def without_feature(image: bytes) -> tuple[int, str]:
    """The byte that makes an image one without the feature verity (EXT4_FEATURE_RO_COMPAT_VERITY)."""
    position = 1024 + 0x65
    return position, f"{image[position] & ~0x80:02x}"


def regions(image: bytes) -> dict[str, list[tuple[int, int]]]:
    """Where what of the sealed files lies in an image: offsets and lengths."""
    file_system = Ext4(lambda offset, length: image[offset : offset + length], len(image))
    found: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("inode", "data", "tail", "tree", "descriptor", "signature", "size", "index")
    }
    for inode in file_system.sealed():
        at = image.index(struct.pack("<60s", inode.block))
        found["inode"].append((at - 0x28, 0x80))
        file = file_system.open(inode)
        base = -(-inode.size // 65536) * 65536

        size = int.from_bytes(file.read(file.end - 4, 4), "little")
        begin = (file.end - 4 - size) // file_system.block_size * file_system.block_size
        found["data"] += _places(file, 0, inode.size)
        found["tail"] += _places(file, inode.size, -(-inode.size // 4096) * 4096)
        found["tree"] += _places(file, base, begin)
        found["descriptor"] += _places(file, begin, begin + 256)
        found["signature"] += _places(file, begin + 256, begin + size)
        found["size"] += _places(file, file.end - 4, file.end)
        if inode.block[6]:
            entries = int.from_bytes(inode.block[2:4], "little")
            for index in range(entries):
                low = int.from_bytes(inode.block[16 + 12 * index : 20 + 12 * index], "little")
                found["index"].append((low * file_system.block_size, 12 * 14))
    return {name: places for name, places in found.items() if places}


def _places(file: File, begin: int, end: int) -> list[tuple[int, int]]:
    return [(where, length) for length, where in file.runs(begin, end) if where >= 0]
