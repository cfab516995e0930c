"""A decision in words: which rule, or each rule and the property that failed."""

from typing import NamedTuple

from ipe_emu.integrity.facts import Facts
from ipe_emu.policy.evaluate import Match, Verdict, holds
from ipe_emu.policy.render import default_statement, property_statement, statement
from ipe_emu.policy.rule import Operation, Policy, Property, PropertyType, Rule


class Tried(NamedTuple):
    """A rule that was looked at, and the first property of it that failed: None if it matched."""

    rule: Rule
    failed: Property | None


def explain(policy: Policy, operation: Operation, facts: Facts) -> list[Tried]:
    """Return the rules of the operation as they are tried, in order, up to the one that matches.

    The work grows with the number of rules: this is for a person's question, ``evaluate`` for a decision.
    """
    tried: list[Tried] = []
    for rule in policy.rules:
        if rule.operation is operation:
            failed = next((prop for prop in rule.properties if not holds(prop, facts)), None)
            tried.append(Tried(rule, failed))
            if failed is None:
                break
    return tried


def why_it_failed(prop: Property, facts: Facts) -> str:
    """Say why a file has not a property, as half a sentence about it."""
    match prop.type:
        case PropertyType.BOOT_VERIFIED_TRUE:
            return "its file system is not the initramfs"
        case PropertyType.BOOT_VERIFIED_FALSE:
            return "its file system is the initramfs"
        case PropertyType.DMV_ROOTHASH:
            found = facts.dmverity_roothash
            return f"its dm-verity root hash is {found}" if found else "it is not on a dm-verity volume"
        case PropertyType.DMV_SIG_TRUE if facts.dmverity_roothash is None:
            return "it is not on a dm-verity volume"
        case PropertyType.DMV_SIG_TRUE:
            return "its dm-verity volume was set up without a trusted signature of the root hash"
        case PropertyType.DMV_SIG_FALSE:
            return "its dm-verity volume was set up with a trusted signature of the root hash"
        case PropertyType.FSV_DIGEST:
            found = facts.fsverity_digest
            return f"its fs-verity digest is {found}" if found else "it has no fs-verity"
        case PropertyType.FSV_SIG_TRUE if facts.fsverity_digest is None:
            return "it has no fs-verity"
        case PropertyType.FSV_SIG_TRUE:
            return "its fs-verity digest has no trusted signature"
        case PropertyType.FSV_SIG_FALSE:
            return "its fs-verity digest has a trusted signature"


def deciding_statement(verdict: Verdict) -> str:
    """Return the line of the policy that decided, as the kernel's audit records have it."""
    if verdict.rule is not None:
        return statement(verdict.rule)
    operation = verdict.operation if verdict.match is Match.OPERATION_DEFAULT else None
    return default_statement(operation, verdict.action)


def in_words(policy: Policy, operation: Operation, facts: Facts) -> list[str]:
    """Say how the decision comes about: a line for each rule that was tried, then the one that decides.

    Positions are the line numbers of the policy's text, where it has one.
    """
    tried = explain(policy, operation, facts)
    lines: list[str] = []
    for rule, failed in tried:
        where = f"line {rule.position.line}: " if rule.position else ""
        if failed is None:
            return [*lines, f"{where}{statement(rule)}: matches, so {rule.action.value}"]
        lines.append(
            f"{where}{statement(rule)}: not {property_statement(failed)}, because {why_it_failed(failed, facts)}"
        )
    return [*lines, _no_match(policy, operation, len(tried))]


def _no_match(policy: Policy, operation: Operation, rules: int) -> str:
    action = policy.effective_default(operation)
    own = operation if operation in policy.defaults else None
    where = policy.default_positions.get(own)
    line = f" (line {where.line})" if where else ""
    what = {0: f"there is no rule for op={operation.value}", 1: f"the one rule for op={operation.value} does not match"}
    reason = what.get(rules, f"none of the {rules} rules for op={operation.value} matches")
    return f"{reason}, so `{default_statement(own, action)}`{line} decides: {action.value}"
