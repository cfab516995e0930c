"""The options that describe an fs-verity digest, named as the program fsverity names them, and its computation."""

import argparse
import os
import re
import stat
from typing import TYPE_CHECKING

from ipe_emu.cli.output import escape
from ipe_emu.cli.verity.images import JOBS, naming, opened
from ipe_emu.cli.verity.progress import progress_bar
from ipe_emu.errors import UserError

if TYPE_CHECKING:
    from ipe_emu.integrity.facts import Digest


def add_digest_options(parser: argparse.ArgumentParser) -> None:
    """Add what a digest depends on besides the content."""
    parser.add_argument("--hash-alg", choices=("sha256", "sha512"), default="sha256", help="default: %(default)s")
    parser.add_argument("--block-size", type=int, default=4096, metavar="BYTES", help="default: %(default)s")
    parser.add_argument("--salt", default="", metavar="HEX", help="at most 32 bytes (default: none)")


def digest_of(path: str, args: argparse.Namespace) -> "tuple[Digest, Digest | None]":
    """Return a file's digest, and the one the kernel has sealed it with, if any.

    UserError for what is no regular file, and for wrong options; OSError as open(2) and pread(2).
    """
    from ipe_emu.integrity.fsverity import measure, sealed_digest
    from ipe_emu.linux.fsverity import measure_verity

    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})*", args.salt, re.ASCII):
        raise UserError(f"--salt is {args.salt!r}; it is pairs of hexadecimal digits")
    with opened(path) as fd, naming(path):
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UserError("fs-verity is for regular files, and this is none")
        with progress_bar(escape(path), found.st_size) as progress:
            digest = measure(
                fd,
                args.hash_alg,
                block_size=args.block_size,
                salt=bytes.fromhex(args.salt),
                jobs=JOBS,
                progress=progress,
            )
        return digest, sealed_digest(fd, measure_verity)
