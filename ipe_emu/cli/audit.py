"""``ipe-emu audit --follow``: the audit records of a mounted emulator, as they come."""

import argparse

from ipe_emu.cli import exit_status
from ipe_emu.cli.mounted import connect, status_of
from ipe_emu.cli.output import print_bytes
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import NotJudgedError, UserError


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "audit",
        line,
        run,
        examples="""\
ipe-emu audit --follow
ipe-emu audit --follow ~/securityfs | grep --line-buffered IPE_ACCESS""",
    )
    parser.add_argument(
        "directory", nargs="?", metavar="DIR", help="where it is mounted (default: the only one there is)"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="print records from now on; what came before is in the file of --audit-log",
    )


def run(args: argparse.Namespace) -> int:
    """Print every record until the emulator ends."""
    if not args.follow:
        raise UserError("only --follow: an emulator keeps no records; those of the past are in its --audit-log FILE")
    from ipe_securityfs.client import RequestError

    with connect(args.directory) as connection:
        status_of(connection)
        try:
            for line in connection.follow():
                print_bytes(line)
        except RequestError as error:
            raise NotJudgedError(str(error)) from None
    return exit_status.OK
