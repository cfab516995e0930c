"""``ipe-emu verity …``: hash trees, digests and signatures of dm-verity and fs-verity."""

import argparse

from ipe_emu.cli.subparsers import Subparsers
from ipe_emu.cli.verity import dm_format, dm_roothash, dm_verify, fs_digest, fs_sign, scan


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command and its own commands."""
    parser = commands.add_parser("verity", help=line, description="Make and check what dm-verity and fs-verity use.")
    kinds = parser.add_subparsers(title="commands", dest="verity_command", metavar="COMMAND", required=True)
    for kind, text, example, modules in (
        ("dm", "images with a dm-verity hash tree", "roothash root.squashfs", (dm_format, dm_roothash, dm_verify)),
        ("fs", "files for fs-verity", "digest /usr/bin/true", (fs_digest, fs_sign)),
    ):
        inner = kinds.add_parser(
            kind,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n  ipe-emu verity {kind} {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).add_subparsers(title="commands", dest=f"verity_{kind}_command", metavar="COMMAND", required=True)
        for module in modules:
            module.add_parser(inner)
    scan.add_parser(kinds)
