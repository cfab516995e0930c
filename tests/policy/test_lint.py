"""The warnings about policies that parse, and that good policies get none."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipe_emu.integrity.facts import Facts
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.lint import MAX_SIGNED, LintWarning, lint
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.rule import Operation, Policy, Position
from tests.policy import strategies
from tests.vectors import BOOT_POLICY

HEADER = b"policy_name=P policy_version=1.0.0\n"
START = HEADER + b"DEFAULT action=DENY\n"
RUN = b"op=EXECUTE boot_verified=TRUE action=ALLOW\n"


def warnings_of(text: bytes) -> list[LintWarning]:
    return lint(parse_policy(text), text)


def kinds(text: bytes) -> list[tuple[str, int, int]]:
    return [(warning.kind, warning.position.line, warning.position.column) for warning in warnings_of(text)]


SHA256 = b"0" * 64
FIRMWARE = START + RUN + b"op=FIRMWARE "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (START + RUN, []),
        (START + RUN + b"op=EXECUTE dmverity_signature=TRUE action=ALLOW\n", []),
        (START, [("initramfs-denied", 2, 1)]),
        (START + b"op=EXECUTE fsverity_signature=TRUE action=ALLOW\n", [("initramfs-denied", 2, 1)]),
        (HEADER + b"DEFAULT action=ALLOW\n", [("execute-allowed", 2, 1)]),
        (START + b"DEFAULT op=EXECUTE action=ALLOW\n", [("execute-allowed", 3, 1)]),
        (HEADER + b"DEFAULT action=ALLOW\n" + RUN, [("execute-allowed", 2, 1), ("pointless", 3, 1)]),
        (START + RUN + b"op=KMODULE action=DENY\n", [("pointless", 4, 1)]),
        (
            START + RUN + b"op=KMODULE boot_verified=TRUE action=DENY\n"
            b"op=KMODULE dmverity_signature=TRUE action=ALLOW\n",
            [],
        ),
        (HEADER + b"DEFAULT action=ALLOW\nop=EXECUTE boot_verified=FALSE action=DENY\n", [("execute-allowed", 2, 1)]),
        (START + RUN + RUN, [("unreachable", 4, 1)]),
        (START + RUN + b"op=EXECUTE boot_verified=TRUE boot_verified=FALSE action=ALLOW\n", [("contradiction", 4, 1)]),
        (
            START + RUN + b"op=KMODULE dmverity_roothash=sha256:" + SHA256 + b" dmverity_roothash=sha512:" + SHA256 * 2
            + b" action=ALLOW\n",
            [("contradiction", 4, 1)],
        ),
        (START + RUN + b"op=POLICY boot_verified=TRUE action=ALLOW\n", [("unsigned-policies", 4, 1)]),
        (
            START + RUN + b"op=POLICY action=ALLOW\n",
            [("unsigned-policies", 4, 1), ("unsigned-policies-by-anyone", 4, 1)],
        ),
        (START + RUN + b"op=POLICY action=DENY\nop=POLICY dmverity_signature=TRUE action=ALLOW\n",
         [("unreachable", 5, 1), ("unsigned-policies", 5, 1)]),
        (FIRMWARE + b"dmverity_signature=FALSE action=ALLOW\n", [("allows-unknown", 4, 13)]),
        (FIRMWARE + b"fsverity_digest=sha256:00 action=ALLOW\n", [("digest-length", 4, 13)]),
        (FIRMWARE + b"fsverity_digest=sha384:" + SHA256 + b" action=ALLOW\n", [("digest-algorithm", 4, 13)]),
        (FIRMWARE + b"dmverity_roothash=SHA256:" + SHA256 + b" action=ALLOW\n", [("digest-algorithm", 4, 13)]),
        (FIRMWARE + b"dmverity_roothash=sha1:" + b"0" * 40 + b" action=ALLOW\n", [("digest-weak", 4, 13)]),
        (FIRMWARE + b"dmverity_roothash=sha512:" + SHA256 * 2 + b" action=ALLOW\n", []),
        (START.replace(b"=P", b"=a/b") + RUN, [("name", 1, 1)]),
        (START.replace(b"\n", b"\r\n") + RUN, [("line-ends", 1, 35)]),
        (START + RUN + b"\0\0", [("nul", 4, 1)]),
        (START + RUN + b"#" * MAX_SIGNED, [("size", 1, 1)]),
    ],
)  # fmt: skip
def test_warnings(text: bytes, expected: list[tuple[str, int, int]]) -> None:
    assert kinds(text) == expected


def test_boot_policy() -> None:
    assert [warning.kind for warning in warnings_of(BOOT_POLICY.read_bytes())] == ["unsigned-policies"]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (b"op=EXECUTE boot_verified=TRUE action=DENY\n", "line 3 matches whenever it does, with another answer"),
        (b"op=EXECUTE boot_verified=TRUE fsverity_digest=sha256:" + SHA256 + b" action=ALLOW\n",
         "line 3 matches whenever it does"),
        (
            b"op=EXECUTE boot_verified=FALSE dmverity_signature=TRUE action=ALLOW\n"
            b"op=EXECUTE dmverity_signature=TRUE action=ALLOW\n",
            "lines 3 or 4 match whenever it does",
        ),
    ],
)  # fmt: skip
def test_who_shadows(rules: bytes, says: str) -> None:
    (warning,) = [warning for warning in warnings_of(START + RUN + rules) if warning.kind == "unreachable"]
    assert warning.text.endswith(says)
    assert str(warning) == f"{warning.position.line}:1: {warning.text} [unreachable]"


crowded = strategies.policies(
    strategies.rules(strategies.few_digests, st.just(Operation.EXECUTE), at_most=3), max_rules=20
)


@settings(max_examples=200)
@given(crowded, st.lists(strategies.facts, min_size=5, max_size=40))
def test_unreachable_rules_decide_nothing(policy: Policy, several: list[Facts]) -> None:
    """Rules that are called unreachable or contradictory never decide; positions are given to tell them apart."""
    placed = Policy(
        policy.name,
        policy.version,
        tuple(
            type(rule)(rule.operation, rule.properties, rule.action, Position(line, 1))
            for line, rule in enumerate(policy.rules, 1)
        ),
        policy.defaults,
        policy.default,
    )
    dead = {warning.position.line for warning in lint(placed) if warning.kind in {"unreachable", "contradiction"}}
    index = RuleIndex(placed)
    for facts in several:
        rule = evaluate(index, Operation.EXECUTE, facts).rule
        assert rule is None or (rule.position is not None and rule.position.line not in dead)


def test_every_other_rule_is_reachable() -> None:
    """Each rule that gets no such warning decides for some file."""
    classes = [
        Facts(boot, roothash, dmv, digest, fsv)
        for boot in (False, True)
        for dmv in (False, True)
        for fsv in (False, True)
        for roothash in DIGESTS
        for digest in DIGESTS
    ]
    choose = random.Random(7)
    reached = 0
    for _ in range(60):
        lines = [_random_rule(choose) for _ in range(12)]
        policy = parse_policy(START + b"".join(lines))
        index = RuleIndex(policy)
        deciding = {id(evaluate(index, Operation.EXECUTE, facts).rule) for facts in classes}
        dead = {warning.position for warning in lint(policy) if warning.kind in {"unreachable", "contradiction"}}
        for rule in policy.rules:
            assert (id(rule) in deciding) is (rule.position not in dead)
            reached += rule.position not in dead
    assert reached > 100


DIGESTS = (None, *(parse_policy(START + line).rules[0].properties[0].digest for line in (
    b"op=EXECUTE fsverity_digest=sha256:00 action=ALLOW\n",
    b"op=EXECUTE fsverity_digest=sha256:01 action=ALLOW\n",
)))  # fmt: skip


def _random_rule(choose: random.Random) -> bytes:
    words = [
        f"{name}={value}"
        for name in ("boot_verified", "dmverity_signature", "fsverity_signature")
        for value in ("TRUE", "FALSE")
    ] + [f"{name}=sha256:0{digit}" for name in ("dmverity_roothash", "fsverity_digest") for digit in "01"]
    some = choose.sample(words, choose.randint(1, 3))
    return f"op=EXECUTE {' '.join(some)} action=DENY\n".encode()


def test_many_rules_give_few_warnings_quickly() -> None:
    rules = b"".join(b"op=POLICY fsverity_digest=sha256:%064x action=DENY\n" % number for number in range(20_000))
    text = START + RUN + rules
    policy = parse_policy(text)
    start = time.process_time()
    assert [warning.kind for warning in lint(policy, text)] == ["size", "pointless"]
    assert time.process_time() - start < 5  # about 0.2 s; comparing each rule with each takes minutes
