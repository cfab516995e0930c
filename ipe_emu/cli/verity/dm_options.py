"""The options that describe a dm-verity hash tree, named as veritysetup names them."""

import argparse
import re
from typing import Any

from ipe_emu.cli.output import say
from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity import Parameters, Superblock
from ipe_emu.integrity.dm_verity.tree import size_of

_PAGE_SIZE = 4096
_TREE_OPTIONS = ("hash", "format", "data_block_size", "hash_block_size", "data_blocks", "salt")


def add_area_options(parser: argparse.ArgumentParser) -> None:
    """Add where the hash area is."""
    group = parser.add_argument_group("the hash area")
    group.add_argument("--hash-offset", type=int, default=0, metavar="BYTES", help="where it begins (default: 0)")
    group.add_argument("--no-superblock", action="store_true", help="it has no superblock")


def parameters_of(args: argparse.Namespace, data_fd: int, *, default_salt: bytes = b"") -> Parameters:
    """Return what the options say of the tree of the data in ``data_fd``. UserError for what is wrong in them."""
    block_size = 4096 if args.data_block_size is None else args.data_block_size
    blocks = args.data_blocks
    if not blocks:  # 0 is all, as for veritysetup
        size = size_of(data_fd)
        blocks = size // block_size if block_size > 0 else 0
        if not blocks and block_size > 0:
            raise UserError(f"size is {size} bytes, which is not one data block of {block_size}")
    parameters = Parameters(
        blocks,
        "sha256" if args.hash is None else args.hash,
        1 if args.format is None else args.format,
        block_size,
        4096 if args.hash_block_size is None else args.hash_block_size,
        default_salt if args.salt is None else _salt(args.salt),
    )
    if parameters.data_block_size > _PAGE_SIZE:
        say(f"data blocks are larger than {_PAGE_SIZE} bytes: a kernel with pages of that size does not map this image")
    return parameters


def _salt(text: str) -> bytes:
    if text == "-":
        return b""
    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})+", text, re.ASCII):
        raise UserError(f"--salt is {text!r}; it is pairs of hexadecimal digits, or - for none")
    return bytes.fromhex(text)


def read_superblock(args: argparse.Namespace, hash_fd: int) -> Superblock:
    """Return the superblock at the offset that was given. UserError for options that contradict it, or a bad one."""
    for name in _TREE_OPTIONS:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: the superblock says this; the option is for --no-superblock")
    return Superblock.read(hash_fd, args.hash_offset)


def described(parameters: Parameters, root_hash: bytes) -> dict[str, Any]:
    """What JSON output says of a tree."""
    return {
        "root_hash": f"{parameters.algorithm}:{root_hash.hex()}",
        "hash_type": parameters.hash_type,
        "data_blocks": parameters.data_blocks,
        "data_block_size": parameters.data_block_size,
        "hash_block_size": parameters.hash_block_size,
        "algorithm": parameters.algorithm,
        "salt": parameters.salt.hex(),
    }
