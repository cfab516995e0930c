"""Put batches of sequences to two machines, and find where their answers differ."""

from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from attrs import field, frozen

from tests.conformance.generate import FIRST, LAST, Step, concrete, reset
from tests.conformance.known import Explanation
from tests.conformance.tally import Tally, tally

Answers = list[dict[str, Any]]
BATCH = LAST - FIRST


class Machine(Protocol):
    """Something that answers sequences of steps."""

    @property
    def name(self) -> str:
        """What differences call it."""

    def answer(self, batch: list[list[Step]]) -> list[Answers]:
        """The answers to each step of each sequence."""


@frozen
class Difference:
    """The first step of a sequence that was answered differently; steps count from 1, without the reset."""

    sequence: list[Step]
    base: int
    step: int
    field: str
    kernel: Any
    emulator: Any

    def describe(self) -> str:
        done = "the reset" if self.step == 0 else str(self.sequence[self.step - 1])
        return f"step {self.step} {self.field}: {done}\n  kernel   {self.kernel}\n  emulator {self.emulator}"


@frozen
class Count:
    """How much was compared."""

    sequences: int = 0
    steps: int = 0
    records: int = 0
    kinds: Tally = field(factory=Counter, repr=False, eq=False)

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.sequences + other.sequences,
            self.steps + other.steps,
            self.records + other.records,
            self.kinds + other.kinds,
        )


def compare(
    kernel: Machine,
    emulator: Machine,
    sequences: list[list[Step]],
    known: Collection[Explanation] = (),
    *,
    enforce: str = "1",
) -> tuple[Count, list[Difference]]:
    """Put at most ``BATCH`` sequences to both. Each starts from a reset, in the same order on both.

    ``enforce`` is where they start (generate.enforcing). With "0" an emulator that judges no execution is compared with
    a kernel that denies none, and what that recorded of executions is left out.
    """
    assert len(sequences) <= BATCH
    # The first reset finds machines that were started differently; what it recorded is not compared.
    batch = [[reset(FIRST, enforce=enforce)]]
    batch += [
        [reset(base, enforce=enforce), *(concrete(step, base) for step in sequence)]
        for base, sequence in enumerate(sequences, FIRST + 1)
    ]
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(emulator.answer, batch)
        theirs = kernel.answer(batch)
        answers = ours.result()
    if enforce == "0":
        _leave_out_executions(theirs)
    count, differences = Count(), []
    for base, (sequence, got, wanted) in enumerate(zip(sequences, answers[1:], theirs[1:], strict=True), FIRST + 1):
        records = sum(len(answer["audit"]) for answer in wanted)
        count += Count(1, len(sequence), records, tally([sequence]))
        first = first_difference(sequence, got, wanted, known)
        if first is not None:
            step, field = first
            differences.append(Difference(sequence, base, step, field, wanted[step][field], got[step][field]))
    return count, differences


def _leave_out_executions(batch: list[Answers]) -> None:
    for answers in batch:
        for answer in answers:
            answer["audit"] = [record for record in answer["audit"] if "ipe_op=EXECUTE" not in record[1]]


def first_difference(
    sequence: list[Step], got: Answers, wanted: Answers, known: Collection[Explanation] = ()
) -> tuple[int, str] | None:
    """The first step (0 is the reset) and its field that differ and are in no table."""
    for number, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for part in ("result", "audit"):
            if mine[part] != theirs[part] and not (
                number and any(explains(sequence[:number], part, mine[part], theirs[part]) for explains in known)
            ):
                return number, part
    return None
