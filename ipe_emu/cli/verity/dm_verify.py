"""``ipe-emu verity dm verify``: check an image, its hash tree, its root hash and who signed that."""

import argparse
import json
from contextlib import ExitStack
from typing import Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import read_bounded
from ipe_emu.cli.hash_tree_options import add_tree_options
from ipe_emu.cli.options import add_kernel_option, add_key_options, keyrings_of
from ipe_emu.cli.output import announce, complain, escape
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.dm_options import (
    add_area_options,
    described,
    parameters_of,
    read_superblock,
)
from ipe_emu.cli.verity.images import JOBS, naming, opened
from ipe_emu.cli.verity.progress import progress_bar
from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.dm_verity import CorruptedError, DmVerity, parse_root_hash
from ipe_emu.integrity.dm_verity.tree import check_data_size
from ipe_emu.profiles import Profile

_SIGNATURE_LIMIT = 1 << 20


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "verify",
        "check an image against its hash tree and root hash",
        run,
        description="Check an image against its hash tree and root hash, and name the first bad block.",
        examples="""\
ipe-emu verity dm verify root.squashfs root.verity $(cat roothash)
ipe-emu verity dm verify --root-hash-signature hash.p7s --builtin-keys signer.pem root.img root.verity $(cat hash)""",
    )
    parser.add_argument("data", metavar="DATA", help="the image")
    parser.add_argument("hash_image", metavar="HASH", help="the image with its hash tree; may be DATA itself")
    parser.add_argument("root_hash", metavar="ROOTHASH", help="HEX or ALGORITHM:HEX, in lower case")
    add_area_options(parser)
    add_tree_options(parser, salt="none")
    parser.add_argument("--root-hash-signature", metavar="FILE", help="PKCS#7 over the root hash; it must be good too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_kernel_option(parser)
    add_key_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything; fails at the first fault."""
    profile = announce(args.kernel)
    with ExitStack() as stack:
        data_fd = stack.enter_context(opened(args.data))
        hash_fd = stack.enter_context(opened(args.hash_image))
        with naming(args.data if args.no_superblock else args.hash_image):
            parameters = (
                parameters_of(args, data_fd) if args.no_superblock else read_superblock(args, hash_fd).parameters
            )
        root_hash = parse_root_hash(args.root_hash, parameters.algorithm)
        report: dict[str, Any] = {"kernel": profile.name, **described(parameters, root_hash), "signature": "none"}
        with naming(args.data):
            check_data_size(data_fd, parameters)
        with naming(args.hash_image):
            tree_offset = parameters.tree_offset(args.hash_offset, superblock=not args.no_superblock)
            volume = DmVerity(parameters, root_hash, data_fd, hash_fd, tree_offset)
        try:
            if args.root_hash_signature is not None:
                report["signature"] = "refused"
                verify_signature(args, root_hash, profile)
                report["signature"] = "verified"
            progress = stack.enter_context(progress_bar("verifying", parameters.data_size))
            volume.verify(jobs=JOBS, progress=progress)
        except KernelError as error:
            report |= {"verified": False, "errno": error.name, "error": escape(error.reason)}
            if isinstance(error, CorruptedError):
                area = "data" if error.level is None else "hash tree"
                report |= {"area": area, "level": error.level, "block": error.block}
            return _finish(args, report)
    return _finish(args, report | {"verified": True})


def verify_signature(args: argparse.Namespace, root_hash: bytes, profile: Profile) -> None:
    """Check what ``--root-hash-signature`` names. KernelError and UserError say what is wrong with it."""
    from ipe_emu.integrity.dm_verity.signature import verify_root_hash

    signature = read_bounded(args.root_hash_signature, _SIGNATURE_LIMIT, "a signature of a root hash")
    keyrings = keyrings_of(args, profile)
    try:
        verify_root_hash(root_hash, signature, keyrings, unavailable_hashes=profile.unavailable_hashes)
    except KernelError as error:
        raise KernelError(error.errno or 0, f"signature of the root hash: {error.reason}", error.function) from None
    except UserError as error:
        raise UserError(f"{escape(args.root_hash_signature)}: {error}") from None


def _finish(args: argparse.Namespace, report: dict[str, Any]) -> int:
    verified: bool = report["verified"]
    if args.json:
        print(json.dumps(report, indent=2))
    elif verified:
        signed = ", signature verified" if report["signature"] == "verified" else ""
        print(f"{escape(args.data)}: verified, {report['root_hash']}{signed}")
    else:
        complain(f"{escape(args.data)}: {report['error']} (the kernel answers {report['errno']})")
    return exit_status.OK if verified else exit_status.DENIED
