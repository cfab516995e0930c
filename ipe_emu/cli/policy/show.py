"""``ipe-emu policy show``: a policy as the kernel understood it."""

import argparse
import json

from ipe_emu.cli import exit_status
from ipe_emu.cli.options import add_kernel_option, add_key_options
from ipe_emu.cli.output import announce, escape, print_bytes, say
from ipe_emu.cli.policy.source import read_source
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.policy.render import render
from ipe_emu.policy.rule import Policy, Rule


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "show",
        "print a policy as the kernel understands it: without comments, one rule a line",
        run,
        examples="""\
ipe-emu policy show lockdown.p7b
ipe-emu policy show --json lockdown.pol""",
    )
    parser.add_argument("file", metavar="FILE", help="a policy's text, or a signed policy; - is stdin")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_kernel_option(parser)
    add_key_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the policy; PolicyError and KernelError tell why there is none."""
    profile = announce(args.kernel)
    source = read_source(args.file, args, profile)
    say(f"{source.name}: {source.remark(profile)}")
    if args.json:
        print(json.dumps({"kernel": profile.name, "signature": source.signature, **_as_json(source.policy)}, indent=2))
    else:
        print_bytes(render(source.policy))  # a name may hold bytes that are no UTF-8
    return exit_status.OK


def _as_json(policy: Policy) -> dict[str, object]:
    return {
        "name": escape(policy.name.encode("latin-1")),
        "version": str(policy.version),
        "default": policy.default.value if policy.default else None,
        "defaults": {operation.value: action.value for operation, action in policy.defaults.items()},
        "rules": [_rule_as_json(rule) for rule in policy.rules],
    }


def _rule_as_json(rule: Rule) -> dict[str, object]:
    return {
        "line": rule.position.line if rule.position else None,
        "operation": rule.operation.value,
        "properties": [p.type.value + (escape(str(p.digest)) if p.digest else "") for p in rule.properties],
        "action": rule.action.value,
    }
