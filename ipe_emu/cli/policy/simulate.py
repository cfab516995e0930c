"""``ipe-emu policy simulate``: what becomes of every program of a tree under a policy, without executing anything."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.options import add_kernel_option, add_key_options
from ipe_emu.cli.output import announce, complain, escape, known
from ipe_emu.cli.policy.source import read_source
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.trees import add_facts_options, add_tree_argument, known_tree
from ipe_emu.policy.explain import deciding_statement
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.rule import Policy, PropertyType

if TYPE_CHECKING:
    from ipe_emu.simulate.judge import Judgement

#: So many of the lines that decided are counted in the summary.
_MOST_RULES = 10
#: Each kind of file, one of it and many.
_WORDS = {
    "program": ("program", "programs"),
    "script": ("script", "scripts"),
    "library": ("library", "libraries"),
    "module": ("module", "modules"),
    "other": ("other file", "other files"),
}


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "simulate",
        "say of every program, library and module of a tree whether it would run, and what it would die of",
        run,
        description=(
            "Say of every program, script, library and kernel module of a tree whether it would run under a policy, by"
            " which rule, or what it would die of. Nothing is executed. Interpreters and libraries are looked for in"
            " the tree, as the kernel and the dynamic linker look for them. The exit status is 0 if all would run, 1"
            " if something would not, and 4 if nothing failed and something could not be judged."
        ),
        examples="""\
ipe-emu policy simulate --policy lockdown.pol --hash-image root.verity --signed root.squashfs
ipe-emu policy simulate --policy lockdown.pol --roothash sha256:c0ffee… rootfs/
ipe-emu policy simulate --policy seals.pol --fsverity sha256 --all rootfs/
ipe-emu policy simulate --policy boot.pol --boot-verified initramfs/ --json initramfs/""",
    )
    parser.add_argument("--policy", required=True, metavar="FILE", help="the policy that is asked, text or signed")
    parser.add_argument("--all", action="store_true", help="print a line for what runs, too")
    parser.add_argument(
        "--module-decompress",
        action=argparse.BooleanOptionalAction,
        help="the kernel unpacks compressed modules itself (CONFIG_MODULE_DECOMPRESS), or leaves it to kmod",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_tree_argument(parser)
    add_facts_options(parser)
    add_kernel_option(parser)
    add_key_options(parser)


def run(args: argparse.Namespace) -> int:
    """Judge the tree, file by file."""
    profile = announce(args.kernel)
    policy = read_source(args.policy, args, profile).policy
    from ipe_emu.cli.verity.progress import counting
    from ipe_emu.simulate.judge import Judge

    summary = _Summary()
    show = _as_json if args.json else _as_text(every=args.all)
    head = {"kernel": profile.name, "policy": escape(policy.name.encode("latin-1")), "tree": escape(args.tree)}
    if args.json:
        print(json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "files": [', end="")
    separator = "\n"
    with known_tree(args, profile, measured=_names_digests(policy)) as what, counting("judging") as one_more:
        judge = Judge(RuleIndex(policy), what, module_decompress=args.module_decompress)
        for found in what.tree.walk():
            one_more()
            judgement = judge.judge(found)
            if judgement is None:
                continue
            summary.add(judgement)
            line = show(judgement)
            if line is not None:
                print((separator if args.json else "") + line, end="" if args.json else "\n")
                separator = ",\n"
    if args.json:
        print('\n  ],\n  "summary": ' + json.dumps(summary.as_json(), indent=2).replace("\n", "\n  ") + "\n}")
    else:
        summary.print()
    if not summary.judged:
        complain("there is no program, library or module in this tree: nothing was judged")
    return summary.status


def _names_digests(policy: Policy) -> bool:
    return any(prop.type is PropertyType.FSV_DIGEST for rule in policy.rules for prop in rule.properties)


class _Summary:
    """How many files of each kind had each outcome, and which lines of the policy decided."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Counter[str]] = {}
        self._rules: Counter[str] = Counter()
        self.judged = 0
        self._failed = 0
        self._unjudged = 0

    def add(self, judgement: "Judgement") -> None:
        from ipe_emu.simulate.judge import Outcome

        self.judged += 1
        self._failed += judgement.outcome.is_failure
        self._unjudged += judgement.outcome is Outcome.NOT_JUDGED
        self._outcomes.setdefault(judgement.kind.value, Counter())[judgement.outcome.value] += 1
        if judgement.decisive is not None:
            self._rules[deciding_statement(judgement.decisive)] += 1

    @property
    def status(self) -> int:
        if self._failed:
            return exit_status.DENIED
        return exit_status.NOT_JUDGED if self._unjudged or not self.judged else exit_status.OK

    def as_json(self) -> dict[str, Any]:
        rules = [{"rule": escape(rule.encode("latin-1")), "files": count} for rule, count in self._rules.most_common()]
        kinds = {kind: dict(counter) for kind, counter in self._outcomes.items()}
        return {"kinds": kinds, "failed": self._failed, "not_judged": self._unjudged, "decided_by": rules}

    def print(self) -> None:
        for kind, (one, many) in _WORDS.items():
            if counter := self._outcomes.get(kind):
                outcomes = ", ".join(_counted(count, outcome) for outcome, count in counter.most_common())
                total = counter.total()
                print(f"{total:,} {one if total == 1 else many}: {outcomes}")
        for rule, count in self._rules.most_common(_MOST_RULES):
            print(f"  {count:,} by {escape(rule.encode('latin-1'))}")
        if len(self._rules) > _MOST_RULES:
            print(f"  and others by {len(self._rules) - _MOST_RULES:,} more rules")


def _counted(count: int, outcome: str) -> str:
    return f"{count:,} {'run' if outcome == 'runs' and count != 1 else outcome}"


def _as_text(*, every: bool) -> "Callable[[Judgement], str | None]":
    from ipe_emu.simulate.judge import Outcome

    def line(judgement: "Judgement") -> str | None:
        if not every and judgement.outcome in {Outcome.RUNS, Outcome.NO_PROGRAM}:
            return None
        words = [f"{escape(judgement.path)}: {judgement.outcome.value}"]
        if judgement.answer:
            words[0] += f" ({_where(judgement)})"
        if judgement.reason:
            words.append(escape(judgement.reason))
        if judgement.decisive is not None and judgement.outcome is not Outcome.NOT_JUDGED:
            words.append(escape(deciding_statement(judgement.decisive).encode("latin-1")))
        return ": ".join(words)

    return line


def _where(judgement: "Judgement") -> str:
    from ipe_emu.policy.rule import Action

    if judgement.answer == "127":
        return "ld.so exits with 127"
    if judgement.decisive is not None and judgement.decisive.action is Action.DENY:
        return f"{judgement.answer} at {judgement.asked[-1].hook.value}"
    return judgement.answer


def _as_json(judgement: "Judgement") -> str:
    decisive = judgement.decisive
    found = {
        "path": escape(judgement.path),
        "kind": judgement.kind.value,
        "outcome": judgement.outcome.value,
        "answer": judgement.answer or None,
        "reason": escape(judgement.reason) or None,
        "decided_by": None if decisive is None else escape(deciding_statement(decisive).encode("latin-1")),
        "asked": [
            {
                "hook": asked.hook.value,
                "path": None if asked.path is None else escape(asked.path),
                "action": asked.verdict.action.value,
            }
            for asked in judgement.asked
        ],
        "known": known(judgement.facts),
    }
    return "    " + json.dumps(found)
