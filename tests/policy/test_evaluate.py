"""Decisions: the index against a naive evaluation, the properties' meanings, and the recorded decisions."""

import re
import timeit
from collections import Counter

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from ipe_emu.errors import NotJudgedError
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.policy.evaluate import Match, Verdict, evaluate, holds
from ipe_emu.policy.explain import explain, in_words, why_it_failed
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.render import default_statement, statement
from ipe_emu.policy.rule import Action, Operation, Policy, Property, PropertyType, Rule, Version
from tests.policy import strategies
from tests.vectors import KERNELS, load

SHA256 = Digest("sha256", bytes(32))
HEADER = b"policy_name=P policy_version=1.0.0\n"


def naive(policy: Policy, operation: Operation, facts: Facts) -> Verdict:
    for rule in policy.rules:
        if rule.operation is operation and all(holds(prop, facts) for prop in rule.properties):
            return Verdict(rule.action, Match.RULE, operation, rule)
    if operation in policy.defaults:
        return Verdict(policy.defaults[operation], Match.OPERATION_DEFAULT, operation)
    assert policy.default is not None
    return Verdict(policy.default, Match.GLOBAL_DEFAULT, operation)


# One operation and few digests: rules meet each other and the facts, several of each in one rule included.
crowded = strategies.policies(
    strategies.rules(strategies.few_digests, st.sampled_from([Operation.EXECUTE, Operation.POLICY]), at_most=4),
    max_rules=40,
)


@settings(max_examples=400)
@given(crowded, st.lists(strategies.facts, min_size=1, max_size=10))
def test_index_is_exact(policy: Policy, several: list[Facts]) -> None:
    index = RuleIndex(policy)
    for facts in several:
        for operation in (Operation.EXECUTE, Operation.POLICY, Operation.KMODULE):
            verdict = evaluate(index, operation, facts)
            expected = naive(policy, operation, facts)
            assert verdict == expected
            assert verdict.rule is expected.rule  # the first of several equal ones


@settings(max_examples=400)
@given(crowded, strategies.facts, st.lists(strategies.facts, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_what_is_decided_in_doubt_is_so_whatever_holds(
    policy: Policy, known: Facts, several: list[Facts], dmverity: bool, fsverity: bool
) -> None:
    index = RuleIndex(policy)
    doubtful = known
    if dmverity:
        doubtful = evolve(doubtful, dmverity_roothash=None, dmverity_signature=False, dmverity_in_doubt="dm")
    if fsverity:
        doubtful = evolve(doubtful, fsverity_digest=None, fsverity_signature=False, fsverity_in_doubt="fs")
    for operation in (Operation.EXECUTE, Operation.POLICY, Operation.KMODULE):
        asked = {
            prop.type.value[:2] for rule in policy.rules if rule.operation is operation for prop in rule.properties
        }
        try:
            verdict = evaluate(index, operation, doubtful)
        except NotJudgedError:
            assert (dmverity and "dm" in asked) or (fsverity and "fs" in asked)
            continue
        for real in several:
            facts = known
            if dmverity:
                roothash, signed = real.dmverity_roothash, real.dmverity_signature
                facts = evolve(facts, dmverity_roothash=roothash, dmverity_signature=signed)
            if fsverity:
                digest, signed = real.fsverity_digest, real.fsverity_signature
                facts = evolve(facts, fsverity_digest=digest, fsverity_signature=signed)
            assert naive(policy, operation, facts) == verdict


@pytest.mark.parametrize(
    ("rules", "judged"),
    [
        ("op=EXECUTE boot_verified=TRUE action=ALLOW\nop=EXECUTE dmverity_signature=FALSE action=DENY", True),
        ("op=EXECUTE boot_verified=FALSE dmverity_signature=FALSE action=ALLOW", True),
        ("op=EXECUTE fsverity_signature=FALSE action=ALLOW", True),
        ("op=KMODULE dmverity_signature=FALSE action=ALLOW", True),
        ("op=EXECUTE dmverity_signature=FALSE action=ALLOW\nop=EXECUTE boot_verified=TRUE action=ALLOW", False),
        ("op=EXECUTE dmverity_roothash=sha256:00 action=DENY", False),
        ("op=EXECUTE boot_verified=TRUE dmverity_signature=TRUE action=ALLOW", False),
    ],
)
def test_only_a_rule_that_asks_for_it_makes_a_doubt_matter(rules: str, judged: bool) -> None:
    index = RuleIndex(parse_policy(HEADER + b"DEFAULT action=ALLOW\n" + rules.encode() + b"\n"))
    facts = Facts(boot_verified=True, dmverity_in_doubt="nobody knows")
    if judged:
        assert evaluate(index, Operation.EXECUTE, facts).action is Action.ALLOW
    else:
        with pytest.raises(NotJudgedError, match="nobody knows; and a rule asks for it: op=EXECUTE"):
            evaluate(index, Operation.EXECUTE, facts)


@given(strategies.policies(), strategies.operations, strategies.facts)
def test_any_policy(policy: Policy, operation: Operation, facts: Facts) -> None:
    assert evaluate(RuleIndex(policy), operation, facts) == naive(policy, operation, facts)


@given(crowded, strategies.facts)
def test_explanation_agrees(policy: Policy, facts: Facts) -> None:
    verdict = evaluate(RuleIndex(policy), Operation.EXECUTE, facts)
    tried = explain(policy, Operation.EXECUTE, facts)
    of_operation = [rule for rule in policy.rules if rule.operation is Operation.EXECUTE]
    assert [rule for rule, _ in tried] == of_operation[: len(tried)]
    for rule, failed in tried[:-1] if verdict.match is Match.RULE else tried:
        assert failed is not None
        held = rule.properties[: rule.properties.index(failed)]
        assert all(holds(prop, facts) for prop in held)
        assert not holds(failed, facts)
        assert why_it_failed(failed, facts)
    if verdict.match is Match.RULE:
        assert tried[-1] == (verdict.rule, None)
    else:
        assert len(tried) == len(of_operation)
    words = in_words(policy, Operation.EXECUTE, facts)
    assert len(words) == len(tried) + (verdict.match is not Match.RULE)
    assert words[-1].endswith(verdict.action.value)


FILES = {
    "nothing": NO_FACTS,
    "initramfs": Facts(boot_verified=True),
    "dm-verity": Facts(dmverity_roothash=SHA256),
    "signed dm-verity": Facts(dmverity_roothash=SHA256, dmverity_signature=True),
    "fs-verity": Facts(fsverity_digest=SHA256),
    "signed fs-verity": Facts(fsverity_digest=SHA256, fsverity_signature=True),
}


@pytest.mark.parametrize(
    ("prop", "having"),
    [
        (Property(PropertyType.BOOT_VERIFIED_TRUE), {"initramfs"}),
        (Property(PropertyType.BOOT_VERIFIED_FALSE), FILES.keys() - {"initramfs"}),
        (Property(PropertyType.DMV_ROOTHASH, SHA256), {"dm-verity", "signed dm-verity"}),
        (Property(PropertyType.DMV_ROOTHASH, evolve(SHA256, algorithm="SHA256")), set()),
        (Property(PropertyType.DMV_ROOTHASH, evolve(SHA256, value=bytes(31))), set()),
        (Property(PropertyType.DMV_ROOTHASH, evolve(SHA256, value=bytes(33))), set()),
        (Property(PropertyType.DMV_ROOTHASH, evolve(SHA256, value=bytes(31) + b"\1")), set()),
        (Property(PropertyType.DMV_ROOTHASH), set()),
        (Property(PropertyType.DMV_SIG_TRUE), {"signed dm-verity"}),
        (Property(PropertyType.DMV_SIG_FALSE), FILES.keys() - {"signed dm-verity"}),
        (Property(PropertyType.FSV_DIGEST, SHA256), {"fs-verity", "signed fs-verity"}),
        (Property(PropertyType.FSV_DIGEST, evolve(SHA256, algorithm="sha512")), set()),
        (Property(PropertyType.FSV_DIGEST), set()),
        (Property(PropertyType.FSV_SIG_TRUE), {"signed fs-verity"}),
        (Property(PropertyType.FSV_SIG_FALSE), FILES.keys() - {"signed fs-verity"}),
    ],
    ids=repr,
)
def test_what_a_property_means(prop: Property, having: set[str]) -> None:
    rule = Rule(Operation.EXECUTE, (prop,), Action.ALLOW)
    index = RuleIndex(Policy("P", Version(1, 0, 0), (rule,), {}, Action.DENY))
    assert {name for name, facts in FILES.items() if holds(prop, facts)} == set(having)
    allowed = {
        name for name, facts in FILES.items() if evaluate(index, Operation.EXECUTE, facts).action is Action.ALLOW
    }
    assert allowed == set(having)


def test_words() -> None:
    policy = parse_policy(
        HEADER + b"DEFAULT action=ALLOW\nDEFAULT op=EXECUTE action=DENY\n"
        b"op=EXECUTE boot_verified=TRUE fsverity_signature=TRUE action=ALLOW\n"
        b"op=EXECUTE dmverity_roothash=sha256:00 action=ALLOW\n"
        b"op=KMODULE boot_verified=TRUE action=ALLOW\n"
    )
    initramfs = Facts(boot_verified=True)
    assert in_words(policy, Operation.EXECUTE, initramfs) == [
        "line 4: op=EXECUTE boot_verified=TRUE fsverity_signature=TRUE action=ALLOW: not fsverity_signature=TRUE, "
        "because it has no fs-verity",
        "line 5: op=EXECUTE dmverity_roothash=sha256:00 action=ALLOW: not dmverity_roothash=sha256:00, "
        "because it is not on a dm-verity volume",
        "none of the 2 rules for op=EXECUTE matches, so `DEFAULT op=EXECUTE action=DENY` (line 3) decides: DENY",
    ]
    assert in_words(policy, Operation.KMODULE, initramfs) == [
        "line 6: op=KMODULE boot_verified=TRUE action=ALLOW: matches, so ALLOW"
    ]
    assert in_words(policy, Operation.KMODULE, NO_FACTS)[-1] == (
        "the one rule for op=KMODULE does not match, so `DEFAULT action=ALLOW` (line 2) decides: ALLOW"
    )
    assert in_words(policy, Operation.FIRMWARE, NO_FACTS) == [
        "there is no rule for op=FIRMWARE, so `DEFAULT action=ALLOW` (line 2) decides: ALLOW"
    ]


def test_incomplete_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a default for FIRMWARE nor a global one"):
        RuleIndex(Policy("P", Version(1, 0, 0), (), {Operation.EXECUTE: Action.DENY}, None))


# What the recorder's set-up gave each file (README.md beside the vectors); digests are those that its policies name.
ROOTHASH = Digest("sha256", bytes.fromhex("ea67240e55d25972e46c7cf9ff664457e810f4c3e1315738637e49d52672c154"))
DMV = Facts(dmverity_roothash=ROOTHASH)
DMVS = Facts(dmverity_roothash=ROOTHASH, dmverity_signature=True)
HELLO = Digest("sha256", bytes.fromhex("23e0c9ad12f1543a36c32bd20f8974ed02078d8279360f4a233a43a4ab924a3b"))
LIBF = Digest("sha256", bytes.fromhex("c3a9907baf1af69fcf7512add26c8517dac5b01cb88a30c6f459a97cc8e20b10"))
BY_PATH = {
    "/mnt/fsv/bin/hello": Facts(fsverity_digest=HELLO),
    "/mnt/fsv/bin/hello_static": Facts(fsverity_digest=SHA256, fsverity_signature=True),  # no policy names its digest
    "/mnt/fsv/lib/libf.so": Facts(fsverity_digest=LIBF, fsverity_signature=True),
    "/mnt/ovl/bin/hello": NO_FACTS,  # copied up
    "/mnt/ovl/bin/hello_new": NO_FACTS,
    "/mnt/ovl/bin/hello_static": DMVS,
    "/mnt/ovl/script/s.sh": DMVS,
    "/mnt/ovl/lib/libf.so": DMVS,
}
BY_DEVICE = {"rootfs": Facts(boot_verified=True), "dm-0": DMV, "dm-1": DMVS}
RECORD = re.compile(r'ipe_op=(\w+) .* path=(\S+) dev=(\S+) ino=\S+ rule="(.*)"$')


@pytest.mark.parametrize("kernel", KERNELS)
def test_recorded_decisions(kernel: str) -> None:
    indices: dict[str, RuleIndex] = {}
    seen: Counter[Match] = Counter()
    for case in load(kernel, "integrity-decisions"):
        if "rules" in case:
            indices[case["policy"]] = RuleIndex(parse_policy(HEADER + case["rules"].encode()))
            continue
        for record in case["audit"]:
            fields = RECORD.match(record["text"])
            if fields is None:
                assert record["type"] != 1420, record
                continue
            operation, path, dev, rule = fields.groups()
            facts = BY_PATH.get(path.strip('"'), BY_DEVICE.get(dev.strip('"'), NO_FACTS))
            verdict = evaluate(indices[case["policy"]], Operation(operation), facts)
            own = verdict.operation if verdict.match is Match.OPERATION_DEFAULT else None
            ours = statement(verdict.rule) if verdict.rule else default_statement(own, verdict.action)
            # An audit record quotes the algorithm and writes the digest in upper case.
            assert ours == re.sub(r'"(\w+)":([0-9A-F]+)', lambda m: f"{m[1]}:{m[2].lower()}", rule), record
            seen[verdict.match] += 1
    assert all(seen[match] > 50 for match in Match)


def _many(count: int) -> Policy:
    """As many rules as asked for, each with a digest of its own; 38,000 of them are a text of just under 4 MiB."""
    rules = b"".join(b"op=POLICY fsverity_digest=sha256:%064x action=DENY\n" % number for number in range(count))
    return parse_policy(HEADER + b"DEFAULT action=ALLOW\n" + rules)


def test_decision_time_is_flat() -> None:
    seconds: dict[int, float] = {}
    for count in (1, 600, 38_000):
        policy = _many(count)
        index = RuleIndex(policy)
        last = policy.rules[-1].properties[0].digest
        facts = Facts(dmverity_roothash=SHA256, fsverity_digest=last)
        assert evaluate(index, Operation.POLICY, facts).rule is policy.rules[-1]
        seconds[count] = (
            min(
                timeit.repeat(lambda: evaluate(index, Operation.POLICY, facts), number=500, repeat=7)  # noqa: B023 - at once
            )
            / 500
        )
    # Going through the rules takes milliseconds; the bound leaves room for a busy machine (it is about 1.3 µs).
    assert max(seconds.values()) < 20e-6, seconds


def test_candidates_are_few() -> None:
    """However many rules ask for the same, eight of each bucket are looked at."""
    booleans = [
        f"boot_verified={boot} dmverity_signature={dmv} fsverity_signature={fsv}"
        for boot in ("TRUE", "FALSE")
        for dmv in ("TRUE", "FALSE")
        for fsv in ("TRUE", "FALSE")
    ]
    digests = ["", "dmverity_roothash=a:00", "fsverity_digest=a:00", "dmverity_roothash=a:00 fsverity_digest=a:00"]
    lines = [f"op=EXECUTE {some} {digest} action=DENY\n" for some in booleans for digest in digests] * 50
    table = RuleIndex(parse_policy(HEADER + b"DEFAULT action=DENY\n" + "".join(lines).encode())).tables[
        Operation.EXECUTE
    ]
    key = ("a", b"\0")
    assert len(table.candidates(None, None)) == 8
    assert len(table.candidates(key, None)) == len(table.candidates(None, key)) == 16
    assert sorted(found.order for found in table.candidates(key, key)) == list(range(32))
