"""The options that are the same everywhere, and the emulator they describe."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ipe_emu.cli.files import name_of, read_bounded
from ipe_emu.cli.output import escape, say
from ipe_emu.errors import KernelError, UserError
from ipe_emu.profiles import DEFAULT_PROFILE, PROFILES, Profile

if TYPE_CHECKING:
    from ipe_emu.audit import AuditRecord
    from ipe_emu.integrity.declared import Declared
    from ipe_emu.integrity.facts import Facts
    from ipe_emu.keyring import Keyrings
    from ipe_emu.lsm import Ipe

    _Ipe = TypeVar("_Ipe", bound=Ipe)

#: Text beyond this is never a policy: what a write(2) may carry.
POLICY_LIMIT = (4 << 20) - 1

_KEYS = {
    "builtin": "compiled into the kernel (.builtin_trusted_keys)",
    "secondary": "added by the administrator (.secondary_trusted_keys)",
    "platform": "of the firmware (.platform), asked when the others do not know the signer",
    "dm-verity": "for signatures of dm-verity root hashes (.dm-verity, since Linux 7.0)",
    "fsverity": "for signatures of fs-verity digests (.fs-verity)",
}


def add_kernel_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--kernel``."""
    parser.add_argument(
        "--kernel",
        choices=tuple(PROFILES),
        help=f"whose answers to give (default: {DEFAULT_PROFILE.name})",
    )


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Add one repeatable option for each keyring."""
    group = parser.add_argument_group(
        "keys", "each takes a PEM or DER file, a bundle or a directory, and may be repeated"
    )
    for name, text in _KEYS.items():
        group.add_argument(f"--{name}-keys", action="append", default=[], metavar="PATH", help=f"certificates {text}")
    group.add_argument(
        "--blacklist",
        action="append",
        default=[],
        metavar="PATH",
        help="certificates that count for nothing, or lists of their hashes (.blacklist)",
    )
    group.add_argument(
        "--revocation-keys",
        action="append",
        default=[],
        metavar="PATH",
        help="certificates whose signatures are refused (the revocation list)",
    )


def add_integrity_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that declare what holds for files."""
    group = parser.add_argument_group("what is known of files (nothing, if not said here)")
    group.add_argument(
        "--integrity", action="append", default=[], metavar="FILE", help="a TOML file: paths, and what holds for them"
    )
    group.add_argument(
        "--boot-verified",
        action="append",
        default=[],
        metavar="PATH",
        help="this file, or directory with everything below it, is on the initramfs (may be repeated)",
    )


def add_lsm_options(parser: argparse.ArgumentParser) -> None:
    """Add everything that describes an emulated machine, and what is known of files."""
    add_machine_options(parser)
    add_integrity_options(parser)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add what describes an emulated kernel: its version, boot policy, command line, log and keys."""
    group = parser.add_argument_group("the emulated machine")
    add_kernel_option(group)
    group.add_argument("--boot-policy", metavar="FILE", help="the policy compiled into the kernel (text)")
    group.add_argument(
        "--cmdline",
        default="",
        metavar="TEXT",
        help="its command line; ipe.enforce=, ipe.success_audit=, dm_verity.keyring_unsealed= and"
        " dm_verity.require_signatures= count",
    )
    group.add_argument(
        "--audit-log",
        metavar="FILE",
        help="where audit records go: a file, a listening unix socket, or - for stderr",
    )
    add_key_options(parser)


def described_machine(args: argparse.Namespace) -> list[str]:
    """The options of ``add_lsm_options`` that were given."""
    names = [
        "kernel",
        "boot_policy",
        "cmdline",
        "audit_log",
        "integrity",
        "boot_verified",
        "blacklist",
        "revocation_keys",
    ]
    names += [f"{name.replace('-', '_')}_keys" for name in _KEYS]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def has_keys(args: argparse.Namespace) -> bool:
    """Whether any key was given that policies can be verified with."""
    return bool(args.builtin_keys or args.secondary_keys or args.platform_keys)


def keyrings_of(args: argparse.Namespace, profile: Profile) -> "Keyrings":
    """Load the keys that were given; UserError for what holds none, or that ``profile`` has no keyring for."""
    from ipe_emu.keyring import Keyrings, load_blacklist, load_certificates

    if args.dm_verity_keys and not profile.dm_verity_keyring:
        raise UserError(
            f"--dm-verity-keys: {profile.name} has no such keyring (Linux has it since 7.0); there, dm-verity trusts"
            " what --builtin-keys, --secondary-keys and --platform-keys say"
        )
    paths = {name: [Path(p) for p in getattr(args, f"{name.replace('-', '_')}_keys")] for name in _KEYS}
    keyrings = Keyrings(
        builtin=load_certificates(paths["builtin"]),
        secondary=load_certificates(paths["secondary"]),
        platform=load_certificates(paths["platform"]) if paths["platform"] else None,
        blacklist=load_blacklist(Path(p) for p in args.blacklist),
        revocation=load_certificates(Path(p) for p in args.revocation_keys),
        dm_verity=load_certificates(paths["dm-verity"]),
        fsverity=load_certificates(paths["fsverity"]),
    )
    for certificate in keyrings.unvouched():
        say(
            f"warning: --secondary-keys: a kernel takes {escape(certificate.readable_name)} into this keyring only as a"
            " machine owner key: no builtin or secondary key has signed it"
        )
    return keyrings


def declared_of(args: argparse.Namespace, volumes: "Iterable[tuple[bytes, Facts]]" = ()) -> "Declared":
    """What the options declare of files; UserError for a path that is not there or a digest that does not match.

    ``volumes`` are directories, and what holds for all that is below each.
    """
    from ipe_emu.integrity import declared
    from ipe_emu.linux import mountinfo

    boot_verified = [Path(p) for p in args.boot_verified]
    return declared.load(mountinfo.locate, [Path(p) for p in args.integrity], boot_verified, volumes)


def build_ipe(args: argparse.Namespace, profile: Profile, emit: "Callable[[AuditRecord], None]") -> "Ipe":
    """The emulator that the options describe, booted. UserError names the option that was wrong."""
    from ipe_emu.lsm import Ipe

    return boot_ipe(args, profile, Ipe, emit)


def boot_ipe(
    args: argparse.Namespace, profile: Profile, make: "Callable[..., _Ipe]", emit: "Callable[[AuditRecord], None]"
) -> "_Ipe":
    """The same, made by another class or function that takes what `lsm.Ipe` does."""
    from ipe_emu.kernel_cmdline import parse_cmdline

    parameters = parse_cmdline(os.fsencode(args.cmdline))
    for word in parameters.ignored:
        say(f"--cmdline {escape(word)}: no boolean; the kernel logs an error and ignores it, and so does this emulator")
    ipe = make(
        keyrings=keyrings_of(args, profile),
        emit=emit,
        profile=profile,
        enforce=parameters.enforce,
        success_audit=parameters.success_audit,
    )
    if args.boot_policy is not None:
        text = read_bounded(args.boot_policy, POLICY_LIMIT, "a policy's text")
        try:
            ipe.load_boot_policy(text, filename=name_of(args.boot_policy))
        except KernelError as error:
            raise UserError(f"--boot-policy: {error} ({error.name}: with such a one IPE does not start)") from None
    return ipe
