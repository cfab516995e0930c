"""What the end of a run says: what was denied, what could not be judged, what was not done."""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from attrs import define, field, frozen

from ipe_emu.event import Hook, Subject
from ipe_emu.exec_hook.plan import Event
from ipe_emu.lsm import Decision, UpstreamRefusal
from ipe_emu.policy.explain import deciding_statement
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import UPSTREAM_OF_OP_POLICY

_Kind = TypeVar("_Kind", "Denial", str)

#: Distinct lines that are remembered of each kind; what comes on top is only counted.
_MOST_REMEMBERED: Final = 1000
_MOST_SHOWN: Final = 20


@frozen
class Denial:
    """What was denied, however often: the operation, the hook, the file (None if there is none), and by what."""

    operation: Operation
    hook: Hook
    path: bytes | None
    by: str


@define(eq=False)
class Report:
    """Collects while the hook answers (see ``hook.Observer``), from any thread; read when that has ended."""

    denied_events: int = field(default=0, init=False)
    failures: list[str] = field(factory=list, init=False)
    _denials: Counter[Denial] = field(factory=Counter, init=False)
    _unjudged: Counter[str] = field(factory=Counter, init=False)
    _undone: Counter[str] = field(factory=Counter, init=False)
    _corrupted: Counter[str] = field(factory=Counter, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def denied(self, event: Event, decision: Decision) -> bool:
        """Note an event that was denied."""
        path = event.file.path if event.file is not None else None
        by = deciding_statement(decision.verdict) if decision.verdict is not None else "?"
        with self._lock:
            self.denied_events += 1
            _count(self._denials, Denial(event.operation, event.hook, path, by))
        return False

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        """Note a call that could not be judged."""
        with self._lock:
            _count(self._unjudged, f"{call} of {_name_of(subject)}: {reason}")

    def not_done(self, subject: Subject | None, call: str, what: str) -> None:
        """Note a call that returned success without being carried out."""
        with self._lock:
            _count(self._undone, f"{call} of {_name_of(subject)}: {what}")

    def corrupted(self, what: str) -> None:
        """Note that a block of a volume is not what its root hash vouches for: reading it failed."""
        with self._lock:
            _count(self._corrupted, what)

    def failed(self, what: str) -> None:
        """Note that a part of the emulator failed: nothing that it answered since counts."""
        with self._lock:
            self.failures.append(what)

    @property
    def all_judged(self) -> bool:
        """Whether every call was judged and nothing of ours failed."""
        return not self._unjudged and not self.failures

    def lines(self, refusals: Sequence[UpstreamRefusal] = ()) -> Iterator[str]:
        """Return the report; nothing if all went well and nothing was denied."""
        if self.denied_events:
            yield f"denied: {self.denied_events}"
            yield from _table(self._denials)
        yield from _listed("not carried out, for the policy allowed it but this is no kernel", self._undone)
        if refusals:
            first = refusals[0]
            kernel = UPSTREAM_OF_OP_POLICY.name
            yield f"done here, refused by {kernel}: {len(refusals)}; the first: {first.what} ({first.answer})"
            if any(refusal.replaced_signed for refusal in refusals):
                yield "warning: an unsigned policy replaced a signed one"
        yield from _listed("corrupted, and reading it (or ahead) answered EIO", self._corrupted)
        yield from _listed("could not be judged", self._unjudged)
        yield from (f"failed: {failure}" for failure in self.failures)


def _count(counter: Counter[_Kind], kind: _Kind) -> None:
    if kind in counter or len(counter) < _MOST_REMEMBERED:
        counter[kind] += 1


def _name_of(subject: Subject | None) -> str:
    return "?" if subject is None else f"{_printable(subject.comm)} (pid {subject.pid})"


def _printable(name: bytes) -> str:
    return repr(os.fsdecode(name))[1:-1]


def _table(denials: Counter[Denial]) -> Iterator[str]:
    rows = [("times", "operation", "hook", "file", "by")]
    for denial, times in denials.most_common(_MOST_SHOWN):
        file = "(memory without a file)" if denial.path is None else _printable(denial.path)
        rows.append((str(times), denial.operation.value, denial.hook.value, file, denial.by))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"  {row[0].rjust(widths[0])}  {'  '.join(cells[1:])}".rstrip()
    yield from _more(denials)


def _listed(title: str, counter: Counter[str]) -> Iterator[str]:
    if not counter:
        return
    yield f"{title}: {counter.total()}"
    for what, times in counter.most_common(_MOST_SHOWN):
        yield f"  {what}" + (f" ({times} times)" if times > 1 else "")
    yield from _more(counter)


def _more(counter: Counter[_Kind]) -> Iterator[str]:
    if len(counter) > _MOST_SHOWN:
        at_least = "at least " if len(counter) == _MOST_REMEMBERED else ""
        yield f"  and {at_least}{len(counter) - _MOST_SHOWN} more kinds"
