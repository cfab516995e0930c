"""A rendered policy parses to the same policy; what no text can say is refused."""

import base64
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given

from ipe_emu.integrity.facts import Digest
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.render import render, statement
from ipe_emu.policy.rule import Action, Operation, Policy, Property, PropertyType, Rule, Version
from tests.policy import strategies
from tests.vectors import KERNELS, load

POLICY = Policy("P", Version(1, 2, 3), (), {}, Action.DENY)


@given(strategies.policies())
def test_round_trip(policy: Policy) -> None:
    text = render(policy)
    assert parse_policy(text) == policy
    assert hash(parse_policy(text)) == hash(policy)
    assert render(parse_policy(text)) == text


@given(strategies.rules())
def test_statement_round_trip(rule: Rule) -> None:
    text = render(POLICY) + statement(rule).encode("latin-1")
    assert parse_policy(text).rules == (rule,)


def test_recorded_policies_render() -> None:
    loaded = [case for case in load(KERNELS[1], "policy-texts") if "name" in case["result"]]
    assert loaded
    for case in loaded:
        policy = parse_policy(base64.b64decode(case["text"]))
        assert parse_policy(render(policy)) == policy


def test_text() -> None:
    digest = Digest("sha256", b"\xab\xcd")
    properties = (Property(PropertyType.DMV_ROOTHASH, digest), Property(PropertyType.BOOT_VERIFIED_FALSE))
    policy = evolve(
        POLICY,
        rules=(Rule(Operation.EXECUTE, properties, Action.ALLOW), Rule(Operation.POLICY, (), Action.DENY)),
        defaults={Operation.KMODULE: Action.ALLOW},
    )
    assert render(policy) == (
        b"policy_name=P policy_version=1.2.3\n"
        b"DEFAULT action=DENY\n"
        b"DEFAULT op=KMODULE action=ALLOW\n"
        b"op=EXECUTE dmverity_roothash=sha256:abcd boot_verified=FALSE action=ALLOW\n"
        b"op=POLICY action=DENY\n"
    )


def _with_property(prop: Property) -> dict[str, Any]:
    return {"rules": (Rule(Operation.EXECUTE, (prop,), Action.ALLOW),)}


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a#b"},
        {"name": "a\0b"},
        {"name": "a\nb"},
        {"name": "\u20ac"},
        {"version": Version(65536, 0, 0)},
        {"version": Version(0, -1, 0)},
        {"default": None},
        {"default": None, "defaults": {Operation.EXECUTE: Action.DENY}},
        _with_property(Property(PropertyType.FSV_DIGEST)),
        _with_property(Property(PropertyType.FSV_DIGEST, Digest("a:b", b""))),
        _with_property(Property(PropertyType.DMV_ROOTHASH, Digest("a b", b""))),
    ],
    ids=repr,
)
def test_what_no_text_says(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        render(evolve(POLICY, **change))
