"""What a person should know about a policy that the kernel would take without a word."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.index import Demand, OperationTable, RuleIndex, demand_of
from ipe_emu.policy.parse import check_name
from ipe_emu.policy.render import property_statement, render
from ipe_emu.policy.rule import Action, Operation, Policy, Position, Property, PropertyType, Rule

# The kernel's ASN.1 decoder takes 65,535 bytes (EMSGSIZE above), signature included. A SignedData with an RSA-2048
# signature and its certificate is about 1,250 bytes longer than its content; one with P-256 about 600.
MAX_SIGNED = 65_535
SIGNATURE_BYTES = 1_250

# Digest lengths in bytes by the kernel crypto API's names; dm-verity takes any of them.
DIGEST_BYTES = {
    "md5": 16,
    "sha1": 20,
    "rmd160": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "sha3-224": 28,
    "sha3-256": 32,
    "sha3-384": 48,
    "sha3-512": 64,
    "blake2b-160": 20,
    "blake2b-256": 32,
    "blake2b-384": 48,
    "blake2b-512": 64,
    "blake2s-128": 16,
    "blake2s-160": 20,
    "blake2s-224": 28,
    "blake2s-256": 32,
    "sm3": 32,
    "streebog256": 32,
    "streebog512": 64,
    "wp256": 32,
    "wp384": 48,
    "wp512": 64,
}
FSVERITY_ALGORITHMS = ("sha256", "sha512")  # fs/verity/hash_algs.c has no others
BROKEN_ALGORITHMS = ("md5", "sha1")
FALSE_PROPERTIES = (PropertyType.BOOT_VERIFIED_FALSE, PropertyType.DMV_SIG_FALSE, PropertyType.FSV_SIG_FALSE)
_START = Position(1, 1)


@frozen(order=True)
class LintWarning:
    """A doubt about a policy: where, its kind (a word that stays, for programs), and a sentence for a person."""

    position: Position
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.position.line}:{self.position.column}: {self.text} [{self.kind}]"


def lint(policy: Policy, text: bytes | None = None) -> list[LintWarning]:
    """Return what is doubtful about a policy, in the order of its text.

    ``text`` is what it was parsed from; without it, what can be seen in a text alone is not looked at, the
    size is that of the rendered policy, and positions that the policy does not know are line 1. The work is linear.
    """
    warnings = [*_name(policy), *_size(policy, text), *_defaults(policy), *_rules(policy)]
    if text is not None:
        warnings += _text(text)
    return sorted(warnings)


def _text(text: bytes) -> Iterator[LintWarning]:
    seen, nul, _ = text.partition(b"\0")
    if nul:
        yield _at_byte(
            text, len(seen), "nul", "the kernel reads no further than this NUL byte; the rest counts for nothing"
        )
    end = seen.find(b"\r")
    if end >= 0:
        yield _at_byte(
            text,
            end,
            "line-ends",
            "carriage returns (CRLF) end lines too; the kernel takes them, but they are part of what is signed",
        )


def _at_byte(text: bytes, offset: int, kind: str, what: str) -> LintWarning:
    before = text[:offset].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return LintWarning(Position(before.count(b"\n") + 1, len(before) - before.rfind(b"\n")), kind, what)


def _name(policy: Policy) -> Iterator[LintWarning]:
    try:
        check_name(policy.name)
    except KernelError as error:
        yield LintWarning(_header(policy), "name", f"{error.reason}: loading it gives {error.name}")


def _size(policy: Policy, text: bytes | None) -> Iterator[LintWarning]:
    length = len(render(policy) if text is None else text)
    if length + SIGNATURE_BYTES > MAX_SIGNED:
        yield LintWarning(
            _header(policy),
            "size",
            f"{length} bytes and a signature (about {SIGNATURE_BYTES}) are over {MAX_SIGNED}, the most that the kernel "
            "verifies: signed, it will be refused with EMSGSIZE",
        )


def _defaults(policy: Policy) -> Iterator[LintWarning]:
    index = RuleIndex(policy)
    position = _default_position(policy, Operation.EXECUTE)
    if policy.effective_default(Operation.EXECUTE) is Action.ALLOW:
        yield LintWarning(
            position, "execute-allowed", "every program may run that no rule denies: EXECUTE is allowed by default"
        )
    elif evaluate(index, Operation.EXECUTE, Facts(boot_verified=True)).action is Action.DENY:
        yield LintWarning(
            position,
            "initramfs-denied",
            "no rule lets the programs of the initramfs run: once this policy is active, the shell and the "
            "tools that activated it can no longer be started (right for a policy that ends the boot, fatal for one "
            "that begins it)",
        )
    for operation in Operation:
        yield from _pointless(policy, operation)
    yield from _unsigned_policies(policy, index)


def _pointless(policy: Policy, operation: Operation) -> Iterator[LintWarning]:
    """Rules that say what the default says anyway, with nothing of the other action behind them.

    Not for op=POLICY and ALLOW: there a matching rule admits unsigned policies and a default does not.
    """
    default = policy.effective_default(operation)
    if operation is Operation.POLICY and default is Action.ALLOW:
        return
    backwards = reversed([rule for rule in policy.rules if rule.operation is operation])
    rules = list(takewhile(lambda rule: rule.action is default, backwards))[::-1]
    if rules:
        yield LintWarning(
            _position(rules[0]),
            "pointless",
            f"{_and_more(rules, operation)} without effect: what is not matched gets {default.value} too, by default",
        )


def _unsigned_policies(policy: Policy, index: RuleIndex) -> Iterator[LintWarning]:
    rules = [rule for rule in policy.rules if rule.operation is Operation.POLICY and rule.action is Action.ALLOW]
    if rules:
        yield LintWarning(
            _position(rules[0]),
            "unsigned-policies",
            f"{_and_more(rules, Operation.POLICY)} what admits unsigned policies with --kernel op-policy, by the "
            "program that writes them: a trusted cat or sh can be made to write anybody's text. Writing a path is "
            "stricter: there the file itself must match",
        )
    verdict = evaluate(index, Operation.POLICY, Facts())
    if verdict.action is Action.ALLOW and verdict.rule is not None:
        yield LintWarning(
            _position(verdict.rule),
            "unsigned-policies-by-anyone",
            "this op=POLICY rule matches programs of which nothing is known: with --kernel op-policy any of them "
            "admits unsigned policies",
        )


def _rules(policy: Policy) -> Iterator[LintWarning]:
    earlier = {operation: OperationTable(policy.effective_default(operation), False, {}) for operation in Operation}
    for order, rule in enumerate(policy.rules):
        for prop in rule.properties:
            yield from _property(rule, prop)
        yield from _unknown_files(rule)
        demand = demand_of(rule.properties)
        if demand is None:
            yield LintWarning(
                _position(rule), "contradiction", "this rule never matches: no file has all its properties"
            )
            continue
        yield from _shadowed(rule, demand, earlier[rule.operation])
        earlier[rule.operation].add(order, rule, demand)


def _shadowed(rule: Rule, demand: Demand, earlier: OperationTable) -> Iterator[LintWarning]:
    """A rule that is never reached, because earlier ones match whatever it matches."""
    left = demand.classes
    shadows: dict[int, Rule] = {}
    for candidate in sorted(earlier.candidates(demand.roothash, demand.fsverity_digest), key=lambda found: found.order):
        if left & candidate.classes:
            left &= ~candidate.classes
            shadows[candidate.order] = candidate.rule
    if not left:
        lines = [str(_position(shadow).line) for shadow in shadows.values()]
        who = f"line {lines[0]} matches" if len(lines) == 1 else f"lines {', '.join(lines[:-1])} or {lines[-1]} match"
        same = all(shadow.action is rule.action for shadow in shadows.values())
        what = "" if same else ", with another answer"
        yield LintWarning(_position(rule), "unreachable", f"this rule is never reached: {who} whenever it does{what}")


def _unknown_files(rule: Rule) -> Iterator[LintWarning]:
    """An ALLOW for what lacks a property; whatever IPE knows nothing of lacks it, too."""
    if (
        rule.action is Action.ALLOW
        and rule.properties
        and all(prop.type in FALSE_PROPERTIES for prop in rule.properties)
    ):
        first = rule.properties[0]
        yield LintWarning(
            rule.position_of(first) or _START,
            "allows-unknown",
            f"{property_statement(first)} holds for every file of which nothing is known"
            + (", and for anonymous memory" if rule.operation is Operation.EXECUTE else ""),
        )


def _property(rule: Rule, prop: Property) -> Iterator[LintWarning]:
    if prop.digest is not None:
        position = rule.position_of(prop) or _START
        for kind, what in _digest(prop, prop.digest):
            yield LintWarning(position, kind, what)


def _digest(prop: Property, digest: Digest) -> Iterator[tuple[str, str]]:
    length = DIGEST_BYTES.get(digest.algorithm)
    if length is None:
        lower = digest.algorithm.lower()
        hint = f"; names are lower-case, write {lower}" if lower in DIGEST_BYTES else ""
        yield (
            "digest-algorithm",
            f"{digest.algorithm[:60]!r} is no digest that the kernel is known to name, so this never matches{hint}",
        )
        return
    if prop.type is PropertyType.FSV_DIGEST and digest.algorithm not in FSVERITY_ALGORITHMS:
        yield (
            "digest-algorithm",
            f"fs-verity knows sha256 and sha512 only, so a {digest.algorithm} digest never matches",
        )
        return
    if len(digest.value) != length:
        yield (
            "digest-length",
            f"a {digest.algorithm} digest has {length} bytes and this one {len(digest.value)}, so it never matches",
        )
    elif digest.algorithm in BROKEN_ALGORITHMS:
        yield "digest-weak", f"{digest.algorithm} is broken: another volume with the same root hash can be made"


def _default_position(policy: Policy, operation: Operation) -> Position:
    return policy.default_positions.get(operation if operation in policy.defaults else None, _header(policy))


def _header(policy: Policy) -> Position:
    return policy.position or _START


def _position(rule: Rule) -> Position:
    return rule.position or _START


def _and_more(rules: Sequence[Rule], operation: Operation) -> str:
    """Name one rule and count the others, so that a long list of digests gives one warning."""
    if len(rules) == 1:
        return "this rule is"
    return f"this rule and {len(rules) - 1} more for op={operation.value} are"
