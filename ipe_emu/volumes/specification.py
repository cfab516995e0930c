"""What ``--volume DIR=IMAGE,…`` says."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import UserError

_OPTION: Final = re.compile(r"([a-z-]+)=(.*)", re.DOTALL)
_NUMBER: Final = re.compile(r"[0-9]{1,19}", re.ASCII)
_SALT: Final = re.compile(r"-|(?:[0-9a-fA-F]{2})+", re.ASCII)


@frozen
class TreeOptions:
    """What the tree of an image without superblock is made of; 0 data blocks are all of the image."""

    algorithm: str = "sha256"
    hash_type: int = 1
    data_block_size: int = 4096
    hash_block_size: int = 4096
    data_blocks: int = 0
    salt: bytes = b""


@frozen
class VolumeSpecification:
    """One volume: the directory that it is mounted at, its image, and what dm-verity is told of it.

    ``hash_image`` is the image with the hash tree (None: the image itself), where its area begins at ``hash_offset``.
    ``tree`` is given for one without superblock. ``signature`` is a PKCS#7 file over the root hash.
    """

    directory: Path
    image: Path
    root_hash: str
    hash_image: Path | None = None
    hash_offset: int = 0
    signature: Path | None = None
    tree: TreeOptions | None = None


#: Those that say what the tree of an image without superblock is made of, as ``ipe-emu verity dm`` names them.
_TREE_OPTIONS: Final = frozenset({"algorithm", "format", "data-block-size", "hash-block-size", "data-blocks", "salt"})
_OPTIONS: Final = frozenset({"roothash", "hash", "hash-offset", "signature"}) | _TREE_OPTIONS
_NO_SUPERBLOCK: Final = "no-superblock"


@define
class _Words:
    """The words of one specification; what is no option belongs to the path before it, which may hold commas."""

    image: str
    options: dict[str, str] = field(factory=dict)
    no_superblock: bool = False

    @classmethod
    def of(cls, text: str) -> "_Words":
        first, *rest = text.split(",")
        words = cls(first)
        last: str | None = None
        for word in rest:
            option = _OPTION.fullmatch(word)
            if option is not None and option[1] in _OPTIONS:
                last = option[1]
                if last in words.options:
                    raise UserError(f"{last} is given twice")
                words.options[last] = option[2]
            elif word == _NO_SUPERBLOCK:
                words.no_superblock = True
            elif last is None:
                words.image += f",{word}"
            else:
                words.options[last] += f",{word}"
        return words


def parse(text: str) -> VolumeSpecification:
    """Return what one ``--volume`` says. UserError names what is wrong in it."""
    try:
        return _parse(text)
    except UserError as error:
        raise UserError(f"--volume {text}: {error}") from None


def _parse(text: str) -> VolumeSpecification:
    directory, equals, rest = text.partition("=")
    if not equals or not directory or not rest:
        raise UserError("it is DIR=IMAGE,roothash=HEX, where DIR is the directory to mount the image at")
    words = _Words.of(rest)
    options = words.options
    if "roothash" not in options:
        raise UserError("roothash=HEX is missing: without it nothing is known of a volume")
    if "hash" not in options and "hash-offset" not in options:
        raise UserError("the hash tree is missing: hash=IMAGE, or hash-offset=BYTES where it is in the same image")
    if not words.no_superblock and (of_tree := [name for name in options if name in _TREE_OPTIONS]):
        raise UserError(f"{of_tree[0]}: the superblock says this; the option is for {_NO_SUPERBLOCK}")
    return VolumeSpecification(
        Path(directory),
        Path(words.image),
        options["roothash"],
        Path(options["hash"]) if "hash" in options else None,
        _number(options, "hash-offset", 0),
        Path(options["signature"]) if "signature" in options else None,
        _tree(options) if words.no_superblock else None,
    )


def _tree(options: Mapping[str, str]) -> TreeOptions:
    salt = options.get("salt", "-")
    if not _SALT.fullmatch(salt):
        raise UserError(f"salt is {salt!r}; it is pairs of hexadecimal digits, or - for none")
    return TreeOptions(
        options.get("algorithm", "sha256"),
        _number(options, "format", 1),
        _number(options, "data-block-size", 4096),
        _number(options, "hash-block-size", 4096),
        _number(options, "data-blocks", 0),
        b"" if salt == "-" else bytes.fromhex(salt),
    )


def _number(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name, str(default))
    if not _NUMBER.fullmatch(text):
        raise UserError(f"{name} is {text!r}; it is a number")
    return int(text)
