"""``ipe-emu verity fs digest``: what fs-verity would measure."""

import argparse
import json
from typing import Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.output import escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.fs_options import add_digest_options, digest_of


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "digest",
        "compute the fs-verity digests of files",
        run,
        description="Compute the fs-verity digests of files, which need not be sealed.",
        examples="""\
ipe-emu verity fs digest /usr/bin/*
ipe-emu verity fs digest --hash-alg sha512 --json tool""",
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    add_digest_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Print ``ALGORITHM:HEX FILE`` for every file, as ``fsverity digest`` does."""
    results: list[dict[str, Any]] = []
    for path in args.files:
        digest, sealed = digest_of(path, args)
        if sealed not in {None, digest}:
            say(f"{escape(path)}: is sealed with other parameters; the kernel's digest is {sealed}")
        results.append({"file": escape(path), "digest": str(digest), "sealed": None if sealed is None else str(sealed)})
        if not args.json:
            print(f"{digest} {escape(path)}")
    if args.json:
        print(json.dumps({"files": results}, indent=2))
    return exit_status.OK
