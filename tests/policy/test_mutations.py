"""Mutated texts: the parser answers with a policy or a documented errno, and never with anything else."""

import base64
import random
from collections import Counter
from collections.abc import Callable

import pytest

from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.render import render
from tests.policy.outcome import outcome
from tests.vectors import KERNELS, load

DOCUMENTED = {"EBADMSG", "EINVAL", "ERANGE"}
MUTANTS = 24_000
SEEDS = range(4)
PIECES = (
    *(bytes([byte]) for byte in b"\0\t\n\v\f\r #=:.+-_0Ffg\x7f\x80\xa0\xc3\xff"),
    b"DEFAULT ",
    b"op=EXECUTE ",
    b"op=",
    b" action=ALLOW\n",
    b"action=",
    b" boot_verified=TRUE ",
    b" dmverity_roothash=sha256:",
    b" fsverity_digest=:",
    b"policy_name=",
    b"policy_version=65536.0.0",
    b"18446744073709551616",
    b"\xef\xbb\xbf",
    b"a" * 300,
)

Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]


def _flip(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    at = choose.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << choose.randrange(8)]) + text[at + 1 :]


def _insert(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    at = choose.randrange(len(text) + 1)
    return text[:at] + choose.choice(PIECES) + text[at:]


def _remove(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    at = choose.randrange(len(text))
    return text[:at] + text[at + choose.randint(1, 12) :]


def _truncate(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    return text[: choose.randrange(len(text))]


def _swap_lines(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    lines = text.split(b"\n")
    choose.shuffle(lines)
    return b"\n".join(lines)


def _swap_tokens(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    tokens = text.split(b" ")
    first, second = choose.randrange(len(tokens)), choose.randrange(len(tokens))
    tokens[first], tokens[second] = tokens[second], tokens[first]
    return b" ".join(tokens)


def _splice(choose: random.Random, text: bytes, others: list[bytes]) -> bytes:
    other = choose.choice(others)
    return text[: choose.randrange(len(text))] + other[choose.randrange(len(other)) :]


def _change_case(choose: random.Random, text: bytes, _: list[bytes]) -> bytes:
    at = choose.randrange(len(text))
    return text[:at] + text[at : at + 12].swapcase() + text[at + 12 :]


MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _insert,
    _remove,
    _truncate,
    _swap_lines,
    _swap_tokens,
    _splice,
    _change_case,
)


def _check(text: bytes) -> str:
    """Parse; hold the error or the policy to what is promised of either; return the errno or ``ok``."""
    result = outcome(text)
    if isinstance(result, PolicyError):
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        assert 1 <= result.position.line <= len(lines), text
        assert 1 <= result.position.column <= len(lines[result.position.line - 1]) + 1, text
        assert str(result).isprintable(), text
        assert result.reason, text
        assert result.function, text
        return result.name
    assert parse_policy(render(result)) == result, text
    return "ok"


@pytest.mark.parametrize("seed", SEEDS)
def test_mutants(seed: int) -> None:
    choose = random.Random(seed)
    texts = [base64.b64decode(case["text"]) for case in load(KERNELS[0], "policy-texts")]
    texts = [text for text in texts if text]
    # Half of the mutants descend from texts that load: the others mostly fail where their parents did.
    good = [base64.b64decode(case["text"]) for case in load(KERNELS[0], "policy-texts") if "name" in case["result"]]
    seen: Counter[str] = Counter()
    for number in range(MUTANTS // len(SEEDS)):
        text = choose.choice(good if number % 2 else texts)
        for _ in range(choose.randint(1, 3)):
            text = choose.choice(MUTATIONS)(choose, text, texts) or b"#"
        seen[_check(text)] += 1
    assert seen.keys() == {"ok", *DOCUMENTED}
    # Neither answer is rare, or the mutants would not say much.
    assert seen["ok"] > 200
    assert seen["EBADMSG"] > 1000
