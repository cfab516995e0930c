"""``ipe-emu mount``: the emulated securityfs on a directory, for every process to poke."""

import argparse
import os
from typing import TYPE_CHECKING

from ipe_emu.cli import exit_status
from ipe_emu.cli.audit_log import STDERR, open_audit_log
from ipe_emu.cli.options import add_lsm_options, build_ipe, declared_of, has_keys
from ipe_emu.cli.output import announce, escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import UserError
from ipe_emu.profiles import Profile

if TYPE_CHECKING:
    from ipe_securityfs.daemon import Mounted


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "mount",
        line,
        run,
        description=(
            "Mount the emulated securityfs on a directory: lsm, and ipe/ with the kernel's names, modes and errnos. It"
            " goes to the background when it is ready. Nothing is sandboxed: what programs execute is not judged; use"
            " `ipe-emu run` for that, `ipe-emu decide` to ask about one file."
        ),
        examples="""\
ipe-emu mount ~/securityfs --boot-policy boot.pol --builtin-keys signer.pem
ipe-emu mount --kernel linux-6.12 --foreground --audit-log - /mnt
ipe-emu umount ~/securityfs""",
    )
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    parser.add_argument("--foreground", action="store_true", help="stay, and end when interrupted")
    parser.add_argument("--force", action="store_true", help="mount even over the host's own securityfs")
    parser.add_argument(
        "--assume-mac-admin",
        action=argparse.BooleanOptionalAction,
        help="give the user who mounts CAP_MAC_ADMIN on this mount (default: yes, unless that is root)",
    )
    add_lsm_options(parser)


def run(args: argparse.Namespace) -> int:
    """Mount, and return when it is ready; with ``--foreground``, when it is over."""
    profile = announce(args.kernel)
    if args.audit_log == STDERR and not args.foreground:
        raise UserError("--audit-log -: what is in the background has no stderr; give a file, or --foreground")
    declared = declared_of(args)
    ipe = build_ipe(args, profile, open_audit_log(args.audit_log))
    _say_what_is_missing(args, profile)
    from ipe_emu.integrity.kernel_state import KernelState
    from ipe_emu.linux.verity_state import VerityState
    from ipe_securityfs.daemon import MountOptions, mount_in_background, mount_in_foreground

    facts = KernelState(declared, VerityState(), ipe.verify_fsverity_signature)
    options = MountOptions(args.directory, force=args.force, assume_mac_admin=args.assume_mac_admin)
    if args.foreground:
        mount_in_foreground(ipe, facts, options, _say_where)
    else:
        _say_where(mount_in_background(ipe, facts, options))
    return exit_status.OK


def _say_what_is_missing(args: argparse.Namespace, profile: Profile) -> None:
    if args.boot_policy is None:
        say("no boot policy: no policy is active, so everything is allowed and nothing is audited (--boot-policy FILE)")
    if not has_keys(args):
        say("no trusted keys: no signature is good (ENOKEY, or EKEYREJECTED). --builtin-keys PATH gives some;")
        say("  `ipe-emu keys new NAME` makes a key for tests, `ipe-emu policy sign` signs with it")
        if args.boot_policy is None and profile.unsigned_policies:
            say("  and without an active policy nothing admits an unsigned one (EBADMSG)")


def _say_where(mounted: "Mounted") -> None:
    where = escape(os.fsencode(mounted.mountpoint))
    if mounted.assumes_mac_admin:
        say("you have CAP_MAC_ADMIN on this mount without having it (--no-assume-mac-admin: EPERM, as on a kernel)")
    for warning in mounted.warnings:
        say(f"warning: {escape(warning)}")
    log = f", its messages go to {escape(mounted.log)}" if mounted.log else ""
    say(f"mounted on {where} (process {mounted.pid}{log})")
    say(f"  `ipe-emu umount {where}` takes it down")
