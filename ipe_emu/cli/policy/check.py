"""``ipe-emu policy check``: whether a kernel would take it, and what its author should know."""

import argparse
import json
from typing import Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import name_of
from ipe_emu.cli.options import add_kernel_option, add_key_options
from ipe_emu.cli.output import announce, escape
from ipe_emu.cli.policy.source import Source, read_source
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import KernelError, UserError
from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.lint import lint
from ipe_emu.profiles import Profile


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        "say whether a kernel would take policies, and what is doubtful in them",
        run,
        examples="""\
ipe-emu policy check lockdown.pol
ipe-emu policy check --builtin-keys signer.pem lockdown.p7b
ipe-emu policy check --json policies/*.pol""",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a policy's text, or a signed policy; - is stdin")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_kernel_option(parser)
    add_key_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check every file, and fail if one of them is not good."""
    profile = announce(args.kernel)
    results = [_check(path, args, profile) for path in args.files]
    if args.json:
        print(json.dumps({"kernel": profile.name, "files": results}, indent=2))
    else:
        for result in results:
            _print(result)
    return exit_status.OK if all(result["ok"] for result in results) else exit_status.USAGE


def _check(path: str, args: argparse.Namespace, profile: Profile) -> dict[str, Any]:
    try:
        source = read_source(path, args, profile)
    except PolicyError as error:
        where = {"line": error.position.line, "column": error.position.column}
        return _bad(path, error.reason) | {"errno": error.name, **where, "suggestion": error.suggestion or None}
    except KernelError as error:
        return _bad(path, error.reason) | {"errno": error.name}
    except UserError as error:
        return _bad(path, str(error).removeprefix(f"{name_of(path)}: "))
    return _good(source, profile)


def _bad(path: str, reason: str) -> dict[str, Any]:
    return {"file": name_of(path), "ok": False, "error": reason}


def _good(source: Source, profile: Profile) -> dict[str, Any]:
    policy = source.policy
    return {
        "file": source.name,
        "ok": True,
        "name": escape(policy.name.encode("latin-1")),
        "version": str(policy.version),
        "rules": len(policy.rules),
        "signature": source.signature,
        "remark": source.remark(profile),
        "warnings": [
            {"line": doubt.position.line, "column": doubt.position.column, "kind": doubt.kind, "warning": doubt.text}
            for doubt in lint(policy, source.text)
        ],
    }


def _print(result: dict[str, Any]) -> None:
    file = result["file"]
    if result["ok"]:
        for warning in result["warnings"]:
            where = f"{file}:{warning['line']}:{warning['column']}"
            print(f"{where}: warning: {escape(warning['warning'])} ({warning['kind']})")
        count = f"{result['rules']} rule" + "s" * (result["rules"] != 1)
        print(f"{file}: ok: {result['name']} {result['version']}, {count}; {result['remark']}")
        return
    where = f"{file}:{result['line']}:{result['column']}" if "line" in result else file
    answer = f" (the kernel answers {result['errno']})" if "errno" in result else ""
    print(f"{where}: error: {result['error']}{answer}")
    if result.get("suggestion"):
        print(f"  {result['suggestion']}")
