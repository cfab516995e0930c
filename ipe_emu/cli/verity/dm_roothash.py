"""``ipe-emu verity dm roothash``: the root hash that an image's data have."""

import argparse
import json
from contextlib import ExitStack

from ipe_emu.cli import exit_status
from ipe_emu.cli.hash_tree_options import add_tree_options
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.dm_options import described, parameters_of, read_superblock
from ipe_emu.cli.verity.images import JOBS, naming, opened
from ipe_emu.cli.verity.progress import progress_bar
from ipe_emu.integrity.dm_verity import compute_root_hash


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "roothash",
        "compute the root hash of an image's data",
        run,
        description="Compute the root hash of an image's data, whatever its hash tree says.",
        examples="""\
ipe-emu verity dm roothash root.squashfs
ipe-emu verity dm roothash root.squashfs root.verity
ipe-emu verity dm roothash --hash sha512 --salt c0ffee root.squashfs""",
    )
    parser.add_argument("data", metavar="DATA", help="the image")
    parser.add_argument("hash_image", nargs="?", metavar="HASH", help="take salt and all else from its superblock")
    add_tree_options(parser, salt="none")
    parser.add_argument("--hash-offset", type=int, default=0, metavar="BYTES", help="where HASH has its superblock")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Print ``ALGORITHM:HEX``, as policies have it."""
    with ExitStack() as stack:
        data_fd = stack.enter_context(opened(args.data))
        if args.hash_image is None:
            with naming(args.data):
                parameters = parameters_of(args, data_fd)
        else:
            hash_fd = stack.enter_context(opened(args.hash_image))
            with naming(args.hash_image):
                parameters = read_superblock(args, hash_fd).parameters
        progress = stack.enter_context(progress_bar("hashing", parameters.data_size))
        with naming(args.data):
            root_hash = compute_root_hash(data_fd, parameters, jobs=JOBS, progress=progress)
    report = described(parameters, root_hash)
    print(json.dumps(report, indent=2) if args.json else report["root_hash"])
    return exit_status.OK
