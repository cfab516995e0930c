"""``ipe-emu verity fs sign``: a builtin signature for a file, as ``fsverity sign`` makes it."""

import argparse
import json

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import create, read_bounded, refuse_to_overwrite
from ipe_emu.cli.output import escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.fs_options import add_digest_options, digest_of

_KEY_LIMIT = 1 << 20


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "sign",
        "sign a file's fs-verity digest",
        run,
        description="Sign a file's fs-verity digest, for FS_IOC_ENABLE_VERITY.",
        examples="""\
ipe-emu verity fs sign --key signer.key --cert signer.pem tool
ipe-emu verity fs sign --key signer.key --cert signer.pem -o signatures/tool.p7s tool""",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--key", required=True, metavar="FILE", help="the private key (PEM)")
    parser.add_argument("--cert", required=True, metavar="FILE", help="its certificate (PEM or DER)")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: FILE with .sig behind it)")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    add_digest_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Sign the digest with the digest's own algorithm."""
    output = args.output or args.file + ".sig"
    refuse_to_overwrite(output, force=args.force)
    key = read_bounded(args.key, _KEY_LIMIT, "a private key")
    certificate = read_bounded(args.cert, _KEY_LIMIT, "a certificate")
    digest, _ = digest_of(args.file, args)
    from ipe_emu.integrity.fsverity_signature import formatted_digest
    from ipe_emu.pkcs7.sign import sign_detached

    signature = sign_detached(formatted_digest(digest), key, certificate, digest=digest.algorithm)
    create(output, signature, mode=0o644, force=args.force)
    if args.json:
        print(json.dumps({"file": escape(args.file), "digest": str(digest), "signature": escape(output)}, indent=2))
    else:
        say(f"wrote {escape(output)} ({len(signature)} bytes): {digest}")
    return exit_status.OK
