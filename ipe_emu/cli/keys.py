"""``ipe-emu keys new``: a private key and its certificate, for tests."""

import argparse
from pathlib import Path

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import create, refuse_to_overwrite
from ipe_emu.cli.output import escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command and its one command."""
    parser = commands.add_parser("keys", help=line, description="Make test keys.")
    inner = parser.add_subparsers(title="commands", dest="keys_command", metavar="COMMAND", required=True)
    new = add_command(
        inner,
        "new",
        "make a test key (NAME.key, mode 0600) and its self-signed certificate (NAME.pem)",
        run,
        examples="""\
ipe-emu keys new signer
ipe-emu keys new --kind ec-p256 --cn 'Test signer' keys/ec""",
    )
    new.add_argument("name", metavar="NAME", help="where to: NAME.key and NAME.pem are made")
    new.add_argument(
        "--kind", choices=("rsa2048", "rsa4096", "ec-p256", "ec-p384"), default="rsa2048", help="default: %(default)s"
    )
    new.add_argument("--cn", metavar="TEXT", help="the certificate's common name (default: the last part of NAME)")
    new.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: argparse.Namespace) -> int:
    """Make both files, or neither."""
    from ipe_emu.pkcs7.keys import new_test_key

    key_file, certificate_file = f"{args.name}.key", f"{args.name}.pem"
    for file in (key_file, certificate_file):
        refuse_to_overwrite(file, force=args.force)
    key, certificate = new_test_key(args.cn if args.cn is not None else Path(args.name).name, kind=args.kind)
    create(key_file, key, mode=0o600, force=args.force)
    create(certificate_file, certificate, mode=0o644, force=args.force)
    say(f"wrote {escape(key_file)} and {escape(certificate_file)}: for tests only")
    return exit_status.OK
