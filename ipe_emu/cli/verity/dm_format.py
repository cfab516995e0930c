"""``ipe-emu verity dm format``: write a hash tree, as ``veritysetup format`` does."""

import argparse
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import create
from ipe_emu.cli.hash_tree_options import add_tree_options
from ipe_emu.cli.output import escape
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.dm_options import add_area_options, described, parameters_of
from ipe_emu.cli.verity.images import JOBS, naming, opened
from ipe_emu.cli.verity.progress import progress_bar
from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity import Parameters, format_image
from ipe_emu.integrity.dm_verity.tree import size_of

_SALT_SIZE = 32


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "format",
        "write an image's hash tree and superblock",
        run,
        examples="""\
ipe-emu verity dm format root.squashfs root.verity
ipe-emu verity dm format --salt - --hash sha512 root.squashfs root.verity
ipe-emu verity dm format --data-blocks 2560 --hash-offset 10485760 disk.img disk.img""",
    )
    parser.add_argument("data", metavar="DATA", help="the image")
    parser.add_argument("hash_image", metavar="HASH", help="where to; DATA itself with --hash-offset behind its data")
    add_tree_options(parser, salt=f"{_SALT_SIZE} random bytes")
    add_area_options(parser)
    parser.add_argument("--uuid", metavar="UUID", help="of the superblock (default: a random one)")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the hash area, and print what it is."""
    identity = _uuid(args)
    with opened(args.data) as data_fd:
        with naming(args.data):
            parameters = parameters_of(args, data_fd, default_salt=os.urandom(_SALT_SIZE))
        parameters.tree_offset(args.hash_offset, superblock=identity is not None)
        with (
            _hash_image(args, data_fd) as hash_fd,
            progress_bar("hashing", parameters.data_size) as progress,
            naming(args.data),
        ):
            root_hash = format_image(
                data_fd, hash_fd, parameters, args.hash_offset, identity=identity, jobs=JOBS, progress=progress
            )
    if args.json:
        print(json.dumps({"uuid": str(identity) if identity else None, **described(parameters, root_hash)}, indent=2))
    else:
        _print(parameters, root_hash, identity)
    return exit_status.OK


def _uuid(args: argparse.Namespace) -> uuid.UUID | None:
    if args.no_superblock:
        if args.uuid is not None:
            raise UserError("--uuid: it stands in the superblock, and --no-superblock is given")
        return None
    if args.uuid is None:
        return uuid.uuid4()
    try:
        identity = uuid.UUID(args.uuid)
    except ValueError:
        identity = None
    if identity is None or str(identity) != args.uuid.lower():
        raise UserError(f"--uuid is {args.uuid!r}; it looks like {uuid.UUID(int=0)}")
    return identity


@contextmanager
def _hash_image(args: argparse.Namespace, data_fd: int) -> Iterator[int]:
    """Open the hash image, for reading too: a new file, or the data's own image. Fails without leaving a part of it."""
    if _is_same(args.hash_image, data_fd):
        size = size_of(data_fd)
        if size > args.hash_offset and not args.force:
            raise UserError(
                f"{escape(args.hash_image)}: goes on behind --hash-offset {args.hash_offset}, to {size} bytes;"
                " --force overwrites what is there"
            )
        with opened(args.hash_image, writable=True) as fd:
            try:
                yield fd
            except BaseException:
                if size_of(fd) > size:
                    os.ftruncate(fd, size)
                raise
        return
    create(args.hash_image, b"", mode=0o644, force=args.force)
    with opened(args.hash_image, writable=True) as fd:
        try:
            yield fd
        except BaseException:
            Path(args.hash_image).unlink()
            raise


def _is_same(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _print(parameters: Parameters, root_hash: bytes, identity: uuid.UUID | None) -> None:
    """Print the lines of ``veritysetup format``, which scripts know how to read."""
    lines = {
        "UUID": identity or "",
        "Hash type": parameters.hash_type,
        "Data blocks": parameters.data_blocks,
        "Data block size": parameters.data_block_size,
        "Hash block size": parameters.hash_block_size,
        "Hash algorithm": parameters.algorithm,
        "Salt": parameters.salt.hex() or "-",
        "Root hash": root_hash.hex(),
    }
    for name, value in lines.items():
        print(f"{name + ':':<17}\t{value}")
