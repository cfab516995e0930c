"""The options that say what a dm-verity hash tree is made of, named as veritysetup names them."""

import argparse


def add_tree_options(parser: argparse.ArgumentParser, *, salt: str) -> None:
    """Add what a tree is made of; ``salt`` says what it is by default."""
    group = parser.add_argument_group("the hash tree")
    group.add_argument("--hash", metavar="NAME", help="hash algorithm, by the kernel's name (default: sha256)")
    group.add_argument("--format", type=int, metavar="N", help="hash type: 1, or 0 as Chrome OS had it (default: 1)")
    group.add_argument("--data-block-size", type=int, metavar="BYTES", help="default: 4096")
    group.add_argument("--hash-block-size", type=int, metavar="BYTES", help="default: 4096")
    group.add_argument("--data-blocks", type=int, metavar="N", help="default: all of the image")
    group.add_argument("--salt", metavar="HEX", help=f"- is none (default: {salt})")
