"""The decision (kernel: ``ipe_evaluate_event``, security/ipe/eval.c)."""

import enum

from attrs import frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.integrity.facts import Facts
from ipe_emu.policy.index import RuleIndex, class_of, digest_key
from ipe_emu.policy.render import statement
from ipe_emu.policy.rule import Action, Operation, Property, PropertyType, Rule

_OF_DMVERITY = frozenset({PropertyType.DMV_ROOTHASH, PropertyType.DMV_SIG_TRUE, PropertyType.DMV_SIG_FALSE})
_OF_FSVERITY = frozenset({PropertyType.FSV_DIGEST, PropertyType.FSV_SIG_TRUE, PropertyType.FSV_SIG_FALSE})


class Match(enum.Enum):
    """What decided (kernel: ``enum ipe_match``)."""

    RULE = "rule"
    OPERATION_DEFAULT = "operation default"
    GLOBAL_DEFAULT = "global default"


@frozen
class Verdict:
    """An answer and its source; ``rule`` is set if and only if ``match`` is RULE."""

    action: Action
    match: Match
    operation: Operation
    rule: Rule | None = None


def evaluate(index: RuleIndex, operation: Operation, facts: Facts) -> Verdict:
    """Return the first rule of the operation whose properties all hold, or the default: its own, then the global one.

    The time it takes does not depend on the number of rules. ``explain`` says the same in words. NotJudgedError where
    a rule asks for something that is in doubt, and would match if it held.
    """
    if facts.dmverity_in_doubt is not None or facts.fsverity_in_doubt is not None:
        _check_doubts(index, operation, facts)
    table = index.tables[operation]
    bit = 1 << class_of(facts)
    first = None
    for candidate in table.candidates(digest_key(facts.dmverity_roothash), digest_key(facts.fsverity_digest)):
        if candidate.classes & bit and (first is None or candidate.order < first.order):
            first = candidate
    if first is not None:
        return Verdict(first.rule.action, Match.RULE, operation, first.rule)
    match = Match.GLOBAL_DEFAULT if table.default_is_global else Match.OPERATION_DEFAULT
    return Verdict(table.default, match, operation)


def _check_doubts(index: RuleIndex, operation: Operation, facts: Facts) -> None:
    """Raise NotJudgedError unless the first rule that matches for certain comes before all that match perhaps."""
    for rule in index.policy.rules:
        if rule.operation is not operation:
            continue
        doubts = [_doubt(prop, facts) for prop in rule.properties]
        if all(doubt is not None or holds(prop, facts) for prop, doubt in zip(rule.properties, doubts, strict=True)):
            doubt = next(filter(None, doubts), None)
            if doubt is None:
                return
            raise NotJudgedError(f"{doubt}; and a rule asks for it: {statement(rule)}")


def _doubt(prop: Property, facts: Facts) -> str | None:
    if prop.type in _OF_DMVERITY:
        return facts.dmverity_in_doubt
    return facts.fsverity_in_doubt if prop.type in _OF_FSVERITY else None


def holds(prop: Property, facts: Facts) -> bool:
    """Tell whether a file has a property (kernel: ``evaluate_property``).

    A digest holds if name, length and bytes are equal. The FALSE forms hold for a file of which nothing is known, and
    where there is no file at all.
    """
    match prop.type:
        case PropertyType.BOOT_VERIFIED_TRUE | PropertyType.BOOT_VERIFIED_FALSE:
            return facts.boot_verified is (prop.type is PropertyType.BOOT_VERIFIED_TRUE)
        case PropertyType.DMV_ROOTHASH:
            return prop.digest is not None and facts.dmverity_roothash == prop.digest
        case PropertyType.DMV_SIG_TRUE | PropertyType.DMV_SIG_FALSE:
            return facts.dmverity_signature is (prop.type is PropertyType.DMV_SIG_TRUE)
        case PropertyType.FSV_DIGEST:
            return prop.digest is not None and facts.fsverity_digest == prop.digest
        case PropertyType.FSV_SIG_TRUE | PropertyType.FSV_SIG_FALSE:
            return facts.fsverity_signature is (prop.type is PropertyType.FSV_SIG_TRUE)
