"""Trees of files that commands look at, and the options that say what is known of them."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ipe_emu.cli.options import add_integrity_options, declared_of
from ipe_emu.cli.output import escape, say
from ipe_emu.errors import UserError

if TYPE_CHECKING:
    from ipe_emu.integrity.facts import Facts
    from ipe_emu.simulate.known import Known

_ROOT_HASH = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}:(?:[0-9a-f]{2}){1,64}", re.ASCII)


def add_tree_options(parser: argparse.ArgumentParser) -> None:
    """Add the tree, and what is known of its files."""
    parser.add_argument("tree", metavar="DIR", help="the root directory of the tree")
    add_integrity_options(parser)
    group = parser.add_argument_group("what the tree is taken for")
    group.add_argument("--roothash", metavar="ALG:HEX", help="a dm-verity volume with this root hash is mounted at DIR")
    group.add_argument("--signed", action="store_true", help="its root hash has a trusted signature")
    group.add_argument(
        "--fsverity", choices=("sha256", "sha512"), help="every file is sealed by fs-verity with this algorithm"
    )
    group.add_argument("--fsverity-signed", action="store_true", help="with a trusted signature, each of them")


@contextmanager
def opened_tree(args: argparse.Namespace, *, measured: bool) -> "Iterator[Known]":
    """Open the tree. UserError for options that contradict each other, and for a tree that is none.

    ``measured`` is whether digests are wanted of files that count as sealed.
    """
    from ipe_emu.cli.verity.images import JOBS
    from ipe_emu.simulate.known import Known, Seals
    from ipe_emu.simulate.tree import open_tree

    if args.signed and args.roothash is None:
        raise UserError("--signed: says that a root hash is signed, and there is none (--roothash)")
    if args.fsverity_signed and args.fsverity is None:
        raise UserError("--fsverity-signed: says that files are sealed with a signature, and they are not (--fsverity)")
    with open_tree(args.tree) as tree:
        if tree.mounts:
            where = ", ".join(map(escape, tree.mounts))
            say(f"other file systems are mounted in {escape(args.tree)}, and not looked at: {where}")
        volumes = [] if args.roothash is None else [(tree.path, _volume(args))]
        seals = None if args.fsverity is None else Seals(args.fsverity, args.fsverity_signed, measured)
        yield Known(tree, declared_of(args, volumes), seals, jobs=JOBS)


def _volume(args: argparse.Namespace) -> "Facts":
    from ipe_emu.integrity.facts import Digest, Facts

    if not _ROOT_HASH.fullmatch(args.roothash):
        raise UserError(f"--roothash is {args.roothash!r}; it is ALGORITHM:HEX, in lower case")
    algorithm, _, value = args.roothash.partition(":")
    return Facts(dmverity_roothash=Digest(algorithm, bytes.fromhex(value)), dmverity_signature=args.signed)
