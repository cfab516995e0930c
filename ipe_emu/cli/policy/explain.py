"""``ipe-emu policy explain``: which rule decides about a file, and why the others did not."""

import argparse
import json
import os
import stat

from ipe_emu.cli import exit_status
from ipe_emu.cli.options import add_integrity_options, add_kernel_option, add_key_options, declared_of
from ipe_emu.cli.output import announce, escape, known
from ipe_emu.cli.policy.source import read_source
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import UserError
from ipe_emu.integrity.facts import Facts
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.explain import in_words
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.rule import Action, Operation


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "explain",
        "say which rule decides about a file, or which property of each rule failed",
        run,
        examples="""\
ipe-emu policy explain --policy boot.pol --op EXECUTE --boot-verified /usr /usr/bin/true
ipe-emu policy explain --policy lockdown.p7b --op KMODULE --integrity facts.toml driver.ko""",
    )
    parser.add_argument("path", metavar="PATH", help="the file")
    parser.add_argument("--op", required=True, choices=[op.value for op in Operation], help="the operation")
    parser.add_argument("--policy", required=True, metavar="FILE", help="the policy that is asked, text or signed")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_kernel_option(parser)
    add_integrity_options(parser)
    add_key_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the answer; the exit status is 0 for ALLOW and 1 for DENY."""
    profile = announce(args.kernel)
    policy = read_source(args.policy, args, profile).policy
    operation = Operation(args.op)
    facts = _facts(args)
    verdict = evaluate(RuleIndex(policy), operation, facts)
    words = in_words(policy, operation, facts)
    if args.json:
        answer = {"action": verdict.action.value, "decided_by": verdict.match.value, "steps": list(map(escape, words))}
        print(json.dumps({"kernel": profile.name, **answer, "known": known(facts)}, indent=2))
    else:
        print(f"{escape(os.fsencode(args.path))}: known: {', '.join(known(facts)) or 'nothing'}")
        for line in words:
            print(f"  {escape(line)}")
        print(verdict.action.value)
    return exit_status.OK if verdict.action is Action.ALLOW else exit_status.DENIED


def _facts(args: argparse.Namespace) -> Facts:
    shown = escape(os.fsencode(args.path))
    from ipe_emu.linux import mountinfo

    try:
        path = os.fsencode(os.path.realpath(args.path, strict=True))
        found = os.stat(path)  # noqa: PTH116 (bytes: a name need not be UTF-8)
        place = mountinfo.locate(path)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{shown}: is no regular file")
    return declared_of(args).facts_of(place, found, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
