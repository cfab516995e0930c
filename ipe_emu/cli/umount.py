"""``ipe-emu umount``: the end of a mounted emulator."""

import argparse

from ipe_emu.cli import exit_status
from ipe_emu.cli.output import escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(commands, "umount", line, run, examples="ipe-emu umount ~/securityfs")
    parser.add_argument("directory", metavar="DIR", help="where it is mounted; a dead mount is taken away as well")


def run(args: argparse.Namespace) -> int:
    """Unmount, and return when the emulator is gone."""
    from ipe_securityfs.client import unmount

    say(escape(unmount(args.directory)))
    return exit_status.OK
