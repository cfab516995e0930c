"""``ipe-emu policy sign``: make of a text what new_policy takes."""

import argparse

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import STDIN, create, read_bounded
from ipe_emu.cli.options import POLICY_LIMIT, add_kernel_option
from ipe_emu.cli.output import announce, escape, say
from ipe_emu.cli.policy.source import read_source
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import UserError

_KEY_LIMIT = 1 << 20


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "sign",
        "sign a policy, as openssl smime -sign -noattr -nodetach -binary -outform der does",
        run,
        examples="""\
ipe-emu policy sign --key signer.key --cert signer.pem lockdown.pol
ipe-emu policy sign --key signer.key --cert signer.pem -o update.p7b lockdown-v2.pol""",
    )
    parser.add_argument("file", metavar="FILE", help="the policy's text; - is stdin")
    parser.add_argument("--key", required=True, metavar="FILE", help="the private key (PEM)")
    parser.add_argument("--cert", required=True, metavar="FILE", help="its certificate (PEM or DER)")
    digests = ("sha256", "sha384", "sha512")
    parser.add_argument("--digest", choices=digests, default=digests[0], help="default: %(default)s")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: FILE with the suffix .p7b)")
    parser.add_argument("--force", action="store_true", help="overwrite the output; sign what a kernel would refuse")
    add_kernel_option(parser)
    parser.set_defaults(builtin_keys=(), secondary_keys=(), platform_keys=())


def run(args: argparse.Namespace) -> int:
    """Sign a text that a kernel takes."""
    profile = announce(args.kernel)
    from ipe_emu.pkcs7.sign import sign_policy

    if args.output is None and args.file == STDIN:
        raise UserError("a policy from stdin needs -o FILE to go to")
    output = args.output or args.file.removesuffix(".pol") + ".p7b"
    if args.force:
        text = read_bounded(args.file, POLICY_LIMIT, "a policy's text")
    else:
        source = read_source(args.file, args, profile)
        if source.signature != "none":
            raise UserError(f"{source.name}: is signed already")
        text = source.text
    key = read_bounded(args.key, _KEY_LIMIT, "a private key")
    certificate = read_bounded(args.cert, _KEY_LIMIT, "a certificate")
    signed = sign_policy(text, key, certificate, digest=args.digest)
    create(output, signed, mode=0o644, force=args.force)
    say(f"wrote {escape(output)} ({len(signed)} bytes)")
    return exit_status.OK
