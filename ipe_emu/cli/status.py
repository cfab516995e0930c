"""``ipe-emu status``: what a mounted emulator holds."""

import argparse
import json
import os
from typing import Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.mounted import connect, status_of
from ipe_emu.cli.output import escape
from ipe_emu.cli.subparsers import Subparsers, add_command


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "status",
        line,
        run,
        examples="""\
ipe-emu status
ipe-emu status --json ~/securityfs""",
    )
    parser.add_argument(
        "directory", nargs="?", metavar="DIR", help="where it is mounted (default: the only one there is)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the state."""
    with connect(args.directory) as connection:
        status = status_of(connection)
    if args.json:
        print(json.dumps({"kernel": status["profile"], **status}, indent=2))
    else:
        _print(status)
    return exit_status.OK


def _print(status: dict[str, Any]) -> None:
    print(f"mounted on     {escape(os.fsencode(status['mountpoint']))}, process {status['pid']}")
    print(f"enforce        {int(status['enforce'])}")
    print(f"success_audit  {int(status['success_audit'])}")
    if status["assumes_mac_admin"]:
        print("capability     its user has CAP_MAC_ADMIN on it without having it")
    counts = ", ".join(f"{count} {kind}" for kind, count in status["records"].items() if count)
    print(f"audit records  {counts or 'none'}")
    if not status["policies"]:
        print("policies       none: everything is allowed and nothing is audited")
    elif status["active"] is None:
        print("policies       none of these is active: everything is allowed and nothing is audited")
    for policy in status["policies"]:
        state = "active" if policy["active"] else "loaded"
        signed = "signed" if policy["signed"] else "not signed"
        name = escape(policy["name"].encode("latin-1"))
        print(f"  {state}  {name} {policy['version']}, {policy['rules']} rule(s), {signed}")
    for refusal in status["upstream_refusals"]:
        print(f"a released kernel refuses: {escape(refusal['what'])} ({refusal['answer']})")
