"""``ipe-emu decide``: ask a mounted emulator about an operation, also one that only a kernel starts."""

import argparse
import json
import os

from ipe_emu.cli import exit_status
from ipe_emu.cli.mounted import ask, connect, status_of
from ipe_emu.cli.output import escape
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import errno_name
from ipe_emu.event import Hook
from ipe_emu.policy.rule import Operation


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "decide",
        line,
        run,
        description=(
            "Ask a mounted emulator what it decides about one operation on one file, as if a kernel had started it, and"
            " have it audited. The exit status is 0 if it is allowed and 1 if it is denied."
        ),
        examples="""\
ipe-emu decide --op EXECUTE /usr/bin/true
ipe-emu decide --op FIRMWARE --mount ~/securityfs /lib/firmware/regulatory.db
ipe-emu decide --op KMODULE --hook KERNEL_LOAD      # a module from memory: there is no file""",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="the file; without it, there is none")
    parser.add_argument("--op", required=True, choices=[op.value for op in Operation], help="the operation")
    parser.add_argument(
        "--hook",
        choices=[hook.value for hook in Hook],
        help="through which hook (default: BPRM_CHECK for EXECUTE, KERNEL_READ for the others)",
    )
    parser.add_argument("--mount", metavar="DIR", help="which mounted emulator (default: the only one there is)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, and print the answer and the audit records."""
    path = None if args.path is None else os.path.realpath(os.fsencode(args.path)).decode("latin-1")
    with connect(args.mount) as connection:
        profile = status_of(connection)["profile"]
        answer = ask(connection, "decide", operation=args.op, hook=args.hook, path=path)
    denied = answer["errno"] != 0
    if args.json:
        print(json.dumps({"kernel": profile, "allowed": not denied, **answer}, indent=2))
    else:
        verdict = answer["verdict"]
        answered = f"denied ({errno_name(answer['errno'])})" if denied else "allowed"
        print(f"{answered}: {_why(verdict)}")
        for record in answer["records"]:
            print(f"type={record['type']} {escape(record['text'].encode('latin-1'))}")
    return exit_status.DENIED if denied else exit_status.OK


def _why(verdict: dict[str, str] | None) -> str:
    if verdict is None:
        return "no policy is active"
    by = escape(verdict["rule"].encode("latin-1")) if verdict["rule"] else f"the {verdict['match']}"
    return f"{by} says {verdict['action']}"
