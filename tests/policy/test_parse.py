"""The parser against the recorded answers, and what it says about each fault."""

import base64
import errno
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipe_emu.errors import KernelError, UserError, errno_name
from ipe_emu.integrity.facts import Digest
from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.parse import check_name, parse_policy
from ipe_emu.policy.rule import Action, Operation, Policy, Position, Property, PropertyType, Rule, Version
from tests.policy.outcome import outcome
from tests.vectors import BOOT_POLICY, KERNELS, load

HEADER = b"policy_name=P policy_version=1.0.0\n"
START = HEADER + b"DEFAULT action=DENY\n"


def answer(text: bytes) -> object:
    """What the recorder saw: a new policy's name and version, or an errno, with the boot policy loaded."""
    try:
        policy = parse_policy(text)
        check_name(policy.name)
    except KernelError as error:
        return {"error": error.name}
    if policy.name == "AllowInitramfs":
        return {"error": "EEXIST"}
    return {"name": policy.name, "version": str(policy.version)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_recorded_texts(kernel: str) -> None:
    cases = load(kernel, "policy-texts")
    assert len(cases) >= 1200
    texts = [base64.b64decode(case["text"]) for case in cases]
    differing = [
        (text, got, case["result"])
        for text, case in zip(texts, cases, strict=True)
        if (got := answer(text)) != case["result"]
    ]
    assert differing == []
    # The length is the written one, whatever follows a NUL byte.
    lengths = [(len(text), case["policy_len"]) for text, case in zip(texts, cases, strict=True) if "policy_len" in case]
    assert lengths
    assert all(ours == recorded for ours, recorded in lengths)


def test_boot_policy() -> None:
    policy = parse_policy(BOOT_POLICY.read_bytes())
    boot_verified = (Property(PropertyType.BOOT_VERIFIED_TRUE),)
    operations = (Operation.EXECUTE, Operation.POLICY, Operation.KMODULE, Operation.FIRMWARE)
    assert policy == Policy(
        "AllowInitramfs",
        Version(0, 0, 0),
        tuple(Rule(operation, boot_verified, Action.ALLOW) for operation in operations),
        {},
        Action.DENY,
    )
    assert [rule.position for rule in policy.rules] == [Position(line, 1) for line in (4, 5, 6, 7)]


def test_positions_of_values() -> None:
    text = (
        b"# c\r\n\tpolicy_name=P policy_version=1.0.0\r\n"
        b" DEFAULT op=KMODULE action=ALLOW\rDEFAULT action=DENY\n"
        b"  op=EXECUTE\t boot_verified=TRUE  fsverity_digest=sha256:AbCd action=ALLOW # c\n"
    )
    policy = parse_policy(text)
    assert policy.position == Position(2, 2)
    assert policy.default_positions == {Operation.KMODULE: Position(3, 2), None: Position(4, 1)}
    (rule,) = policy.rules
    assert rule.position == Position(5, 3)
    assert [rule.position_of(prop) for prop in rule.properties] == [Position(5, 15), Position(5, 35)]
    assert rule.properties[1].digest == Digest("sha256", b"\xab\xcd")
    assert policy.defaults == {Operation.KMODULE: Action.ALLOW}
    assert policy.default is Action.DENY


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (b"+1.0.0", Version(1, 0, 0)),
        (b"00001.000000000000000000000000000000002.+3", Version(1, 2, 3)),
        (b"65535.65535.65535", Version(65535, 65535, 65535)),
        (b"1.0", errno.EBADMSG),
        (b"1.0.0.0", errno.EBADMSG),
        (b"1.0.0.x", errno.EBADMSG),
        (b"1.0.", errno.EINVAL),
        (b"++1.0.0", errno.EINVAL),
        (b"-1.0.0", errno.EINVAL),
        (b"+.0.0", errno.EINVAL),
        (b"1_0.0.0", errno.EINVAL),
        (b"\xb2.0.0", errno.EINVAL),
        (b"65536.0.0", errno.ERANGE),
        (b"65536x.0.0", errno.EINVAL),
        (b"18446744073709551615x.0.0", errno.EINVAL),
        (b"18446744073709551616x.0.0", errno.ERANGE),
        (b"0" * 50 + b"18446744073709551616.0.0", errno.ERANGE),
        (b"9" * 100_000 + b".0.0", errno.ERANGE),
        (b"0" * 100_000 + b"7.0.0", Version(7, 0, 0)),
        (b"x.65536.0", errno.EINVAL),
        (b"1.65536.x", errno.ERANGE),
    ],
)
def test_versions(version: bytes, expected: Version | int) -> None:
    text = b"policy_name=P policy_version=" + version + b"\nDEFAULT action=DENY\n"
    if isinstance(expected, Version):
        assert parse_policy(text).version == expected
    else:
        with pytest.raises(PolicyError) as raised:
            parse_policy(text)
        assert raised.value.name == errno_name(expected)


# One fault each: its name, the text, the errno, where it is, and what the message must say.
FAULTS = [
    ("empty", b"", "EBADMSG", (1, 1), "the policy is empty", "policy_name=NAME"),
    ("only comments", b"# a\n  \t\n", "EBADMSG", (1, 1), "nothing but comments", "policy_name=NAME"),
    ("NUL first", b"\0" + START, "EBADMSG", (1, 1), "before the first NUL byte", "plain text"),
    ("UTF-8 mark", b"\xef\xbb\xbf" + START, "EBADMSG", (1, 1), "byte order mark (UTF-8)", "without one"),
    ("UTF-16", START.decode().encode("utf-16"), "EBADMSG", (1, 1), "byte order mark (UTF-16)", "without one"),
    ("signed", b"0\x82\x05\x34\x06\x09", "EBADMSG", (1, 1), "a signed policy", "verify it first"),
    ("no header", b"DEFAULT action=DENY\n", "EBADMSG", (1, 1), "starts with `DEFAULT`", "policy_name=NAME"),
    (
        "version first",
        b" policy_version=1.0.0 policy_name=P",
        "EBADMSG",
        (1, 2),
        "policy_version= comes before",
        "start",
    ),
    ("empty name", b"policy_name= policy_version=1.0.0", "EBADMSG", (1, 13), "policy name is empty", "one word"),
    ("name of two words", b"policy_name=my policy policy_version=1.0.0", "EBADMSG", (1, 16), "`policy`", "no blanks"),
    ("no version", b"policy_name=P\n", "EBADMSG", (1, 14), "no policy_version=", "policy_version=1.0.0"),
    ("empty version", b"policy_name=P policy_version=\n", "EBADMSG", (1, 30), "no policy_version=", "1.0.0"),
    ("two version parts", b"policy_name=P policy_version=1.0\n", "EBADMSG", (1, 15), "2 parts", "1.0.0"),
    ("four version parts", b"policy_name=P policy_version=1.0.0.1\n", "EBADMSG", (1, 36), "4 parts", "1.0.0"),
    ("version part empty", b"policy_name=P policy_version=1..0\n", "EINVAL", (1, 32), "is empty", "1.0.0"),
    ("version part a word", b"policy_name=P policy_version=1.x.0\n", "EINVAL", (1, 32), "`x` is not", ""),
    ("version part too big", b"policy_name=P policy_version=1.0.65536\n", "ERANGE", (1, 34), "over 65535", ""),
    ("surplus", b"policy_name=P policy_version=1.0.0 x=1\n", "EBADMSG", (1, 36), "`x=1` follows", "lines of their own"),
    ("no default", HEADER, "EBADMSG", (1, 1), "neither a global default nor one for EXECUTE, ", "DEFAULT action=DENY"),
    (
        "one default missing",
        HEADER + b"".join(f"DEFAULT op={o.value} action=DENY\n".encode() for o in Operation if o.value != "KMODULE"),
        "EBADMSG",
        (1, 1),
        "nor one for KMODULE",
        "DEFAULT action=DENY",
    ),
    (
        "two defaults",
        START + b"DEFAULT action=DENY",
        "EBADMSG",
        (3, 1),
        "second default for all operations; the first is on line 2",
        "keep one",
    ),
    (
        "two defaults of an operation",
        START + b"DEFAULT op=POLICY action=DENY\n\n DEFAULT op=POLICY action=ALLOW",
        "EBADMSG",
        (5, 2),
        "second default for op=POLICY; the first is on line 3",
        "keep one",
    ),
    (
        "default with property",
        START + b"DEFAULT op=POLICY boot_verified=TRUE action=DENY",
        "EBADMSG",
        (3, 19),
        "no properties",
        "leave DEFAULT away",
    ),
    (
        "default for nothing",
        START + b"DEFAULT boot_verified=TRUE action=DENY",
        "EBADMSG",
        (3, 9),
        "before the operation",
        "op=… first",
    ),
    (
        "default twice in a line",
        START + b"DEFAULT DEFAULT action=DENY",
        "EBADMSG",
        (3, 9),
        "stands twice",
        "DEFAULT op=EXECUTE",
    ),
    ("default in lower case", START + b"default action=DENY", "EBADMSG", (3, 1), "`default`", "`DEFAULT`?"),
    (
        "default later",
        START + b"op=EXECUTE DEFAULT action=DENY",
        "EBADMSG",
        (3, 12),
        "after the operation",
        "write it first",
    ),
    (
        "operation's other name",
        START + b"op=KERNEL_MODULE action=DENY",
        "EBADMSG",
        (3, 4),
        "unknown operation `KERNEL_MODULE`",
        "did you mean `KMODULE`?",
    ),
    ("operation of IMA", START + b"op=MODULE action=DENY", "EBADMSG", (3, 4), "`MODULE`", "did you mean `KMODULE`?"),
    (
        "operation in lower case",
        START + b"op=execute action=DENY",
        "EBADMSG",
        (3, 4),
        "`execute`",
        "did you mean `EXECUTE`?",
    ),
    (
        "operation misspelt",
        START + b"op=FIRMWEAR action=DENY",
        "EBADMSG",
        (3, 4),
        "`FIRMWEAR`",
        "did you mean `FIRMWARE`?",
    ),
    ("operation unknown", START + b"op=QQQ action=DENY", "EBADMSG", (3, 4), "`QQQ`", "EXECUTE, FIRMWARE, KMODULE"),
    (
        "operation's key in upper case",
        START + b"OP=EXECUTE action=DENY",
        "EBADMSG",
        (3, 1),
        "`OP=EXECUTE`",
        "`op=EXECUTE`?",
    ),
    ("operation missing", START + b"action=DENY", "EBADMSG", (3, 1), "names no operation", "op=… first"),
    (
        "two operations",
        START + b"op=EXECUTE op=POLICY action=DENY",
        "EBADMSG",
        (3, 12),
        "one operation",
        "rule of its own",
    ),
    (
        "property first",
        START + b"boot_verified=TRUE op=EXECUTE action=DENY",
        "EBADMSG",
        (3, 1),
        "before the operation",
        "op=… first",
    ),
    ("second header", START + HEADER, "EBADMSG", (3, 1), "a second header", "write of its own"),
    (
        "property unknown",
        START + b"op=EXECUTE uid=0 action=DENY",
        "EBADMSG",
        (3, 12),
        "unknown property `uid`",
        "boot_verified=TRUE",
    ),
    (
        "property misspelt",
        START + b"op=EXECUTE fsverity_digset=sha256:00 action=DENY",
        "EBADMSG",
        (3, 12),
        "`fsverity_digset`",
        "`fsverity_digest`?",
    ),
    (
        "value in lower case",
        START + b"op=EXECUTE boot_verified=true action=DENY",
        "EBADMSG",
        (3, 26),
        "cannot be `true`",
        "did you mean `TRUE`?",
    ),
    (
        "value a number",
        START + b"op=EXECUTE boot_verified=0 action=DENY",
        "EBADMSG",
        (3, 26),
        "cannot be `0`",
        "did you mean `FALSE`?",
    ),
    (
        "value missing",
        START + b"op=EXECUTE boot_verified action=DENY",
        "EBADMSG",
        (3, 25),
        "has no value",
        "boot_verified=TRUE or",
    ),
    (
        "digest missing",
        START + b"op=EXECUTE fsverity_digest= action=DENY",
        "EBADMSG",
        (3, 28),
        "has no value",
        "ALGORITHM:HEX",
    ),
    (
        "digest without algorithm",
        START + b"op=EXECUTE fsverity_digest=00 action=DENY",
        "EBADMSG",
        (3, 28),
        "names no algorithm",
        "sha256:",
    ),
    (
        "digest odd",
        START + b"op=EXECUTE fsverity_digest=sha256:000 action=DENY",
        "EINVAL",
        (3, 38),
        "odd number",
        "two digits",
    ),
    (
        "digest not hexadecimal",
        START + b"op=EXECUTE fsverity_digest=sha256:0g00 action=DENY",
        "EINVAL",
        (3, 36),
        "`g`",
        "",
    ),
    (
        "digest with a vertical tab",
        START + b"op=EXECUTE fsverity_digest=sha256:00\x0b00 action=DENY",
        "EINVAL",
        (3, 37),
        "`\\x0b`",
        "",
    ),
    (
        "action missing",
        START + b"op=EXECUTE boot_verified=TRUE",
        "EBADMSG",
        (3, 12),
        "ends with `boot_verified=TRUE`",
        "action=ALLOW or",
    ),
    ("action in a comment", START + b"op=EXECUTE #action=DENY", "EBADMSG", (3, 1), "no action at its end", "comment"),
    ("action in lower case", START + b"op=EXECUTE action=deny", "EBADMSG", (3, 19), "`deny`", "did you mean `DENY`?"),
    (
        "action of another language",
        START + b"op=EXECUTE action=REJECT",
        "EBADMSG",
        (3, 19),
        "`REJECT`",
        "did you mean `DENY`?",
    ),
    ("action empty", START + b"op=EXECUTE action=", "EBADMSG", (3, 19), "has no value", "action=ALLOW or"),
    (
        "action not last",
        START + b"op=EXECUTE action=DENY boot_verified=TRUE",
        "EBADMSG",
        (3, 12),
        "follows the action",
        "at the end",
    ),
    ("two actions", START + b"op=EXECUTE action=DENY action=DENY", "EBADMSG", (3, 12), "follows the action", "once"),
    (
        "vertical tab between",
        START + b"op=EXECUTE\x0baction=DENY",
        "EBADMSG",
        (3, 1),
        "`op=EXECUTE\\x0baction=DENY`",
        "",
    ),
]


@pytest.mark.parametrize(
    ("text", "name", "position", "reason", "suggestion"),
    [fault[1:] for fault in FAULTS],
    ids=[fault[0] for fault in FAULTS],
)
def test_faults(text: bytes, name: str, position: tuple[int, int], reason: str, suggestion: str) -> None:
    with pytest.raises(PolicyError) as raised:
        parse_policy(text, filename="p.pol")
    error = raised.value
    assert error.name == name
    assert (error.position.line, error.position.column) == position
    assert reason in error.reason
    assert suggestion in error.suggestion
    assert error.function
    where = f"p.pol:{position[0]}:{position[1]}: {error.reason}"
    assert str(error) == (f"{where}; {error.suggestion}" if error.suggestion else where)


def test_error_is_both_kinds() -> None:
    with pytest.raises(PolicyError) as raised:
        parse_policy(b"")
    assert isinstance(raised.value, KernelError)
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, ValueError)
    assert not isinstance(raised.value, UserError)
    assert raised.value.filename == "<policy>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("P", None),
        ("...", None),
        ("%s", None),
        ("\xc3\xa9", None),
        ("A" * 255, None),
        (".", "EACCES"),
        ("..", "EACCES"),
        ("/", "EACCES"),
        ("a/b", "EACCES"),
        ("A" * 256, "ENAMETOOLONG"),
        ("A" * 256 + "/", "EACCES"),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    if expected is None:
        check_name(name)
    else:
        with pytest.raises(KernelError) as raised:
            check_name(name)
        assert raised.value.name == expected


def test_too_long() -> None:
    longest = START + b"#" * ((4 << 20) - 1 - len(START))
    assert parse_policy(longest).name == "P"
    with pytest.raises(PolicyError) as raised:
        parse_policy(longest + b"#")
    assert raised.value.name == "ENOMEM"


RECORDED = [base64.b64decode(case["text"]) for case in load(KERNELS[0], "policy-texts")]
recorded = st.sampled_from(RECORDED)


@given(recorded, st.binary(max_size=20))
def test_nothing_counts_after_nul(text: bytes, rest: bytes) -> None:
    assert answer(text + b"\0" + rest) == answer(text)


@given(recorded, st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\r", b"\n# c\n", b" \xa0\n\t\v\n"]))
def test_lines_end_in_any_way(text: bytes, end: bytes) -> None:
    assert answer(text.replace(b"\n", end)) == answer(text)


@given(recorded, st.sampled_from([b"\t", b"  ", b" \t "]))
def test_tokens_part_in_any_way(text: bytes, blank: bytes) -> None:
    assert answer(text.replace(b" ", blank)) == answer(text)


@given(recorded, st.text("\t\v\f \xa0", max_size=5))
def test_trailing_space(text: bytes, space: str) -> None:
    assert answer(text.replace(b"\n", space.encode("latin-1") + b"\n")) == answer(text)


LENGTH = (4 << 20) - 1
HOSTILE = {
    "blanks": b" " * LENGTH,
    "lines": b"\n" * LENGTH,
    "CRLF": b"\r\n" * (LENGTH // 2),
    "comments": b"#" * LENGTH,
    "one word": b"a" * LENGTH,
    "name": b"policy_name=" + b"a" * (LENGTH - 12),
    "version": b"policy_name=P policy_version=" + b"9" * (LENGTH - 29),
    "version parts": b"policy_name=P policy_version=" + b"1." * (LENGTH // 2 - 15),
    "operation": START + b"op=" + b"E" * (LENGTH - len(START) - 3),
    "properties": START + b"op=EXECUTE" + b" fsverity_digest=a:" * (LENGTH // 19 - 10) + b" action=ALLOW\n",
    "blanks in a rule": START + b"op=EXECUTE" + b" " * (LENGTH - len(START) - 30) + b"action=ALLOW",
    "digest": START + b"op=EXECUTE fsverity_digest=a:" + b"0" * (LENGTH - len(START) - 50) + b" action=ALLOW",
    "algorithms": START + b"".join(b"op=EXECUTE fsverity_digest=%d:0 action=DENY\n" % n for n in range(80_000)),
    "rules": START + b"op=POLICY action=DENY\n" * (LENGTH // 22 - 10),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.timeout(20)
def test_work_is_bounded(text: bytes) -> None:
    assert len(text) <= LENGTH
    start = time.process_time()
    result = outcome(text)
    # Linear work takes about half a second here; anything quadratic in 4 MiB takes hours.
    assert time.process_time() - start < 10
    if isinstance(result, PolicyError):
        assert result.name in {"EBADMSG", "EINVAL", "ERANGE"}
        assert len(str(result)) < 500
    else:
        assert result.rules
