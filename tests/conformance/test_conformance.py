"""The referee itself: what it generates, how it shrinks, and that it sees a difference. No kernel is needed here."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from attrs import evolve, frozen

from tests.conformance import audit, known
from tests.conformance.compare import BATCH, Answers, Count, compare, first_difference
from tests.conformance.generate import FIRST, Generator, Step, concrete, enforcing, reset
from tests.conformance.machines import MountedEmulator, RunningEmulator
from tests.conformance.payloads import octets
from tests.conformance.script import script
from tests.conformance.shrink import shrink


def some(seed: int, count: int, *, way: str = "run") -> list[list[Step]]:
    generator = Generator(seed)
    return [generator.sequence(20, way=way) for _ in range(count)]


def test_the_same_seed_gives_the_same_sequences() -> None:
    assert some(7, 5) == some(7, 5)
    assert some(7, 5) != some(8, 5)


def test_every_step_can_be_done_shown_and_sent() -> None:
    for sequence in some(1, 60):
        for step in sequence:
            json.dumps(concrete(step, FIRST))
        compile(script(sequence, FIRST), "script", "exec")


def test_a_payload_is_made_for_the_number_of_its_sequence() -> None:
    payload = {"text": "policy_name=A policy_version={base}.0.0\n", "signer": "trusted"}
    assert b"policy_version=12.0.0" in octets(payload, 12)
    assert octets(payload, 12) == octets(payload, 12)
    assert (
        octets(payload | {"mutate": [["truncate", 0.5, 1]]}, 12) == octets(payload, 12)[: len(octets(payload, 12)) // 2]
    )


@frozen
class Stub:
    """A machine whose answers are made up: ``odd`` marks the steps that it answers in its own way."""

    odd: Sequence[Step] = ()
    name: str = "stub"

    def answer(self, batch: list[list[Step]]) -> list[Answers]:
        return [[{"result": step in self.odd, "audit": []} for step in sequence] for sequence in batch]


def test_a_difference_is_found_and_shrunk_to_what_shows_it() -> None:
    sequences = some(3, 4)
    wrong = sequences[2][7] = {"op": "list", "path": "ipe/new"}
    count, differences = compare(Stub(), Stub([wrong]), sequences)
    assert count == Count(4, 80, 0)
    assert [(d.sequence, d.step, d.field) for d in differences] == [(sequences[2], 8, "result")]

    asked: list[int] = []

    def differing(candidates: list[list[Step]]) -> list[bool]:
        asked.append(len(candidates))
        return [wrong in candidate for candidate in candidates]

    assert shrink(sequences[2], differing) == [wrong]
    assert max(asked) <= BATCH


def test_what_makes_a_step_special_is_taken_away() -> None:
    first, second = {"literal": "1"}, {"text": "a\nb\nc\n", "signer": "trusted", "mutate": [["cut", 0.1, 2]]}
    step: Step = {"op": "write", "path": "ipe/new_policy", "as": "uid 1000", "payloads": [first, second], "flags": 1}

    def differing(candidates: list[list[Step]]) -> list[bool]:
        return [any("signer" in payload for s in c for payload in s["payloads"]) for c in candidates]

    plain = {"text": "a\n", "signer": "trusted"}
    assert shrink([step, step], differing) == [
        {"op": "write", "path": "ipe/new_policy", "payloads": [plain], "flags": 1}
    ]


def test_records_are_compared_as_well() -> None:
    answer: dict[str, Any] = {"result": {"ok": 0}, "audit": [[1404, "enforcing=1"]]}
    step: Step = {"op": "write", "path": "ipe/enforce"}
    assert first_difference([step], [answer, answer], [answer, answer]) is None
    assert first_difference([step], [answer, answer | {"audit": []}], [answer, answer]) == (1, "audit")


def test_only_the_size_of_an_open_node_is_known() -> None:
    stat = {"op": "stat", "path": "ipe/enforce"}
    opened = {"op": "fd_open", "path": "ipe/enforce", "fd": "1", "flags": 0}
    good = {"result": {"mode": "100600", "size": "0"}, "audit": []}
    sized = {"result": {"mode": "100600", "size": "1"}, "audit": []}
    other = {"result": {"mode": "100644", "size": "1"}, "audit": []}
    assert first_difference([opened, stat], [good, good, sized], [good] * 3, known.MOUNT) is None
    assert first_difference([opened, stat], [good, good, sized], [good] * 3, known.RUN) == (2, "result")
    assert first_difference([opened, stat], [good, good, other], [good] * 3, known.MOUNT) == (2, "result")
    assert first_difference([stat], [good, sized], [good] * 2, known.MOUNT) == (1, "result")


def test_op_policy_may_differ_in_its_answer_to_text_alone() -> None:
    step: Step = {"op": "write", "path": "ipe/new_policy", "payloads": [{"text": "policy_name=A\n"}]}
    signed = step | {"payloads": [{"text": "policy_name=A\n", "signer": "trusted"}]}
    together: Step = {"op": "together", "writers": 2, "each": step}
    load = "policy_name=? policy_version=? policy_digest=? auid=0 ses=* lsm=ipe res=0 errno="
    start = {"result": {"ok": 0}, "audit": []}
    wanted = {"result": [{"error": "EBADMSG"}], "audit": [[1422, load + "-74"]]}
    denied = [1420, 'ipe_op=POLICY ipe_hook=POLICY_LOAD rule="DEFAULT action=DENY"']
    refused = {"result": [{"error": "EACCES"}], "audit": [denied, [1422, load + "-13"]]}
    loaded = {"result": [{"ok": 5}], "audit": [[1422, load + "-74"]]}
    executed = wanted | {"audit": [[1420, "ipe_op=EXECUTE"], [1422, load + "-74"]]}
    assert first_difference([step], [start, refused], [start, wanted], known.OP_POLICY) is None
    assert first_difference([step], [start, refused], [start, wanted]) == (1, "result")
    assert first_difference([step], [start, loaded], [start, wanted], known.OP_POLICY) == (1, "result")
    assert first_difference([step], [start, executed], [start, wanted], known.OP_POLICY) == (1, "audit")
    # A damaged signature is no text.
    assert first_difference([signed], [start, refused], [start, wanted], known.OP_POLICY) == (1, "result")
    both = [answer | {"result": {"each": [answer["result"]] * 2}} for answer in (refused, wanted)]
    assert first_difference([together], [start, both[0]], [start, both[1]], known.OP_POLICY) is None
    one = both[0] | {"result": {"each": [[{"ok": 5}], refused["result"]]}}
    assert first_difference([together], [start, one], [start, both[1]], known.OP_POLICY) == (1, "result")
    large = {"result": [{"error": "EMSGSIZE"}], "audit": [[1422, load + "-90"]]}
    assert first_difference([step], [start, refused], [start, large], known.OP_POLICY) is None


def test_a_module_s_signature_is_known_for_secure_boot_alone() -> None:
    step: Step = {"op": "module", "file": "/mnt/tmpfs/garbage"}
    other = {"op": "execve", "file": "/mnt/tmpfs/garbage"}
    good: dict[str, Any] = {"result": {"ok": 0}, "audit": []}
    mine: dict[str, Any] = {"result": {"error": "ENOEXEC"}, "audit": []}
    theirs: dict[str, Any] = {"result": {"error": "EKEYREJECTED"}, "audit": []}
    assert first_difference([step], [good, mine], [good, theirs], known.SECURE_BOOT) is None
    assert first_difference([other], [good, mine], [good, theirs], known.SECURE_BOOT) == (1, "result")
    assert first_difference([step], [good, theirs], [good, mine], known.SECURE_BOOT) == (1, "result")
    assert first_difference([step], [good, mine], [good, theirs], known.RUN) == (1, "result")


def test_a_record_loses_only_what_is_the_machine_s() -> None:
    text = 'ipe_op=EXECUTE pid=12 comm="x" path="/pid=3" dev="sda" ino=7 auid=5 ses=4294967295'
    assert audit.normal(text) == 'ipe_op=EXECUTE pid=* comm="x" path="/pid=*" dev=* ino=* auid=5 ses=*'


@pytest.mark.needs("fuse", "root", "busybox")
@pytest.mark.timeout(100)
@pytest.mark.parametrize("way", ["mount", "tools", "run"])
def test_two_emulators_agree_and_profiles_differ(way: str) -> None:
    """The driver does every kind of step on a real emulator, and its answers are those of another one."""
    kind = RunningEmulator if way == "run" else MountedEmulator
    sequences = some(5, 4, way=way)
    count, differences = compare(kind("linux-7.3"), kind("linux-7.3"), sequences, enforce=enforcing(way))
    assert not differences
    assert count.sequences == 4
    assert count.records > 10
    # The older kernel's records of loaded policies do not end in errno=.
    _, differences = compare(kind("linux-7.3"), kind("linux-6.12"), [[]])
    assert [(d.step, d.field) for d in differences] == [(0, "audit")]


@pytest.mark.needs("fuse", "root", "busybox")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [MountedEmulator, RunningEmulator])
def test_a_machine_of_platform_keys_has_no_policy_and_takes_what_they_signed(kind: type[MountedEmulator]) -> None:
    policies = {"op": "list", "path": "ipe/policies"}
    answers = kind("linux-6.12", trusts="platform").answer([[policies, reset(FIRST), policies]])[0]
    assert [answer["result"] for answer in answers] == [{"names": []}, {"ok": 0}, {"names": [f"Reset{FIRST}"]}]
    answers = kind("linux-6.12").answer([[policies]])[0]
    assert answers[0]["result"] == {"names": ["AllowInitramfs"]}


@pytest.mark.needs("root")
def test_a_kernel_that_says_nothing_is_an_error_and_no_agreement() -> None:
    mute = evolve(MountedEmulator("linux-7.3"), profile="no such profile")
    with pytest.raises(Exception, match="it gave no answers"):
        mute.answer([[]])
