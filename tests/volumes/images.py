"""Images of volumes for tests, made by the tools that everybody makes them with."""

from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from ipe_emu.integrity.dm_verity import Parameters
from ipe_emu.volumes.recognise import Kind
from tests.integrity.tools import tool, veritysetup_format

BLOCK = 4096


@frozen
class Volume:
    """An image, the image with its hash tree, and its root hash."""

    kind: Kind
    image: Path
    hash_image: Path
    root_hash: str

    def option(self, directory: Path | str, *more: str) -> str:
        """What ``--volume`` is given."""
        return ",".join([f"{directory}={self.image}", f"roothash={self.root_hash}", f"hash={self.hash_image}", *more])


def _squashfs(tree: Path, image: Path, *options: str) -> None:
    # Data as it is, so that a test finds it in the image.
    done = tool("mksquashfs", tree, image, "-noappend", "-noD", "-noF", "-no-xattrs", "-quiet", *options)
    assert done.returncode == 0, done.stderr


def _ext4(tree: Path, image: Path, *options: str) -> None:
    done = tool("mke2fs", "-q", "-t", "ext4", "-b", BLOCK, "-d", tree, *options, image, "16M")
    assert done.returncode == 0, done.stderr


def _erofs(tree: Path, image: Path, *options: str) -> None:
    done = tool("mkfs.erofs", *options, image, tree)
    assert done.returncode == 0, done.stderr


MAKERS: dict[Kind, Callable[..., None]] = {Kind.SQUASHFS: _squashfs, Kind.EXT4: _ext4, Kind.EROFS: _erofs}


def make_image(kind: Kind, tree: Path, image: Path, *options: str) -> Path:
    """Make an image of the files in ``tree``."""
    MAKERS[kind](tree, image, *options)
    return image


def make_volume(kind: Kind, tree: Path, place: Path, name: str = "", salt: bytes = b"salt") -> Volume:
    """Make an image and its hash tree in the directory ``place``."""
    image = make_image(kind, tree, place / f"{name or kind.value}.img")
    return protect(kind, image, salt)


def protect(kind: Kind, image: Path, salt: bytes = b"salt") -> Volume:
    """Make a hash tree for an image."""
    hash_image = image.with_suffix(".verity")
    parameters = Parameters(image.stat().st_size // BLOCK, salt=salt)
    return Volume(kind, image, hash_image, veritysetup_format(image, hash_image, parameters))


def tamper(path: Path, position: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
