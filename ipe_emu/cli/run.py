"""``ipe-emu run``: a command whose every execution the emulator judges."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ipe_emu.cli.audit_log import audit_file, open_audit_log
from ipe_emu.cli.mounted import connect, status_of
from ipe_emu.cli.options import add_lsm_options, build_ipe, declared_of, described_machine
from ipe_emu.cli.output import announce, escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.images import JOBS
from ipe_emu.cli.verity.progress import progress_bar
from ipe_emu.errors import UserError
from ipe_emu.profiles import PROFILES

if TYPE_CHECKING:
    from ipe_emu.integrity.sources import Place
    from ipe_emu.volumes.image import VerifiedImage


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "run",
        line,
        run,
        usage="ipe-emu run [options] -- COMMAND [ARGUMENT ...]",
        description=(
            "Run a command in a sandbox in which the emulated IPE judges every execution, every executable mapping and"
            " every module, with its securityfs at /sys/kernel/security. No root is needed. This is a rehearsal and no"
            " security boundary: a program that means to can get around it."
        ),
        examples="""\
ipe-emu run --boot-policy boot.pol --boot-verified /usr -- sh -c 'cat /sys/kernel/security/ipe/policies/*/name'
ipe-emu run --kernel linux-7.3 --boot-policy boot.pol --integrity facts.toml --fail-on-deny -- ./provision.sh
ipe-emu run --attach ~/securityfs -- sh""",
    )
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run; options end before it")
    parser.add_argument(
        "--attach", metavar="DIR", help="have the emulator that is mounted on DIR judge, with its own facts"
    )
    parser.add_argument(
        "--sealable",
        action="append",
        default=[],
        metavar="DIR",
        help="let this directory, with everything below it, stand for a file system with fs-verity: files can be sealed"
        " there, until the run ends (may be repeated)",
    )
    parser.add_argument("--fail-on-deny", action="store_true", help="exit with 1 if anything was denied")
    parser.add_argument("--debug", action="store_true", help="say how the sandbox is made, step by step")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="DIR=IMAGE,roothash=HEX[,hash=IMAGE][,hash-offset=BYTES][,signature=P7S]",
        help="mount a squashfs, ext4 or erofs image on DIR, as on dm-verity: with this root hash, the hash tree in"
        " another image or behind the data, and a signature of the root hash (may be repeated). For a tree without"
        " superblock: no-superblock, algorithm=, format=, data-block-size=, hash-block-size=, data-blocks=, salt=",
    )
    add_lsm_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is its own, or one of ours."""
    if not args.argv:
        raise UserError("which command? ipe-emu run [options] -- COMMAND [ARGUMENT ...]")
    if args.attach is not None:
        if given := described_machine(args) + ["--sealable"] * bool(args.sealable):
            raise UserError(f"{given[0]} and --attach: the emulator that is mounted there has its own")
        with connect(args.attach) as connection:
            profile = PROFILES[status_of(connection)["profile"]]
    else:
        profile = announce(args.kernel)
    declared = declared_of(args)
    from ipe_emu.kernel_cmdline import parse_cmdline

    parameters = parse_cmdline(os.fsencode(args.cmdline))
    volumes = _volumes(args, signed=parameters.dm_verity_require_signatures)
    from ipe_emu.exec_hook.run import RunOptions
    from ipe_emu.exec_hook.run import run as run_command

    emit = open_audit_log(args.audit_log)
    return run_command(
        RunOptions(
            command=args.argv,
            make_ipe=lambda: build_ipe(args, profile, emit),
            declared=declared,
            sealable=[_directory(path) for path in args.sealable],
            attach=Path(args.attach) if args.attach is not None else None,
            audit_log=audit_file(args.audit_log),
            fail_on_deny=args.fail_on_deny,
            debug=args.debug,
            volumes=volumes,
            dm_verity_unsealed=parameters.dm_verity_keyring_unsealed,
        )
    )


def _volumes(args: argparse.Namespace, *, signed: bool) -> "list[VerifiedImage]":
    """The volumes that the options describe, opened. UserError for what a kernel would not mount.

    ``signed`` is whether each root hash must be (``dm_verity.require_signatures``).
    """
    if not args.volume:
        return []
    if args.attach is not None:
        raise UserError("--volume and --attach: the emulator that is mounted there cannot serve volumes")
    from ipe_emu.volumes.image import open_verified
    from ipe_emu.volumes.specification import parse

    specifications = [parse(text) for text in args.volume]
    for specification in specifications:
        if signed and specification.signature is None:
            raise UserError(
                f"--volume {escape(str(specification.directory))}: no signature= for its root hash, and --cmdline says"
                " dm_verity.require_signatures: a kernel answers ENOKEY (verity_verify_root_hash)"
            )
    images = [open_verified(specification) for specification in specifications]
    for image in images:
        if image.hides_errors:
            with progress_bar("verifying", image.size) as progress:
                image.verify(jobs=JOBS, progress=progress)
        image.find_seals()
    return images


def _directory(path: str) -> "Place":
    """Where a directory that stands for a file system with fs-verity lies; UserError if it is none."""
    from ipe_emu.integrity.fsverity import FILE_SYSTEMS
    from ipe_emu.linux import mountinfo

    try:
        real = os.path.realpath(os.fsencode(path), strict=True)
        if not os.path.isdir(real):  # noqa: PTH112 - bytes paths: names need not be UTF-8
            raise UserError(f"--sealable {escape(path)}: not a directory")
        place = mountinfo.locate(real)
    except OSError as error:
        raise UserError(f"--sealable {escape(path)}: {error.strerror}") from None
    if place.kind not in FILE_SYSTEMS:
        say(f"--sealable {escape(path)}: no kernel has fs-verity on {place.kind}; it stands for one that can have it")
    return place
