"""The timeline of a boot as a picture: inline SVG, from left to right in seconds.

Lanes from the top: which root file system is in place; each policy, thin while it is loaded and thick while it is in
force; executions, denied ones taller; and what happened, as numbered marks that a table explains.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from attrs import frozen

from ipe_emu.event import Hook
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report.printable import printable
from ipe_emu.rehearse.report.summary import PolicyLife, Summary
from ipe_emu.rehearse.words import line_of

#: Units of the picture's own coordinates; a page scales it.
WIDTH: Final = 1060
_LEFT: Final = 190
_RIGHT: Final = WIDTH - 20
_LANE: Final = 30
_MARK: Final = 9
_MOST_POLICIES: Final = 12
#: Marks beyond this are left to the list of events; denials of executions have a lane of their own.
MOST_MARKS: Final = 40
_LONGEST_LABEL: Final = 24
_MARKED: Final = (
    events.PolicyLoaded, events.PolicyActivated, events.PolicyDeleted, events.ControlFailed, events.EnforceChanged,
    events.SwitchedRoot, events.NotJudged, events.Rebooted, events.Panicked, events.TimedOut, events.ShellOpened,
    events.Interrupted, events.Failed,
)  # fmt: skip
_BAD: Final = (events.ControlFailed, events.Panicked, events.TimedOut, events.Failed)
_DOUBTFUL: Final = (events.NotJudged, events.EnforceChanged, events.ShellOpened, events.Interrupted)


@frozen
class Mark:
    """A numbered mark: ``kind`` is good, bad or doubtful."""

    number: int
    event: Event
    text: str
    kind: str


def marks_of(summary: Summary) -> list[Mark]:
    """Choose what gets a mark, in order: what was done to policies, the first denial of each kind, and the end."""
    first_denials = {denial.first for denial in summary.denials}
    chosen = [
        event
        for event in summary.events
        if isinstance(event, _MARKED)
        or (isinstance(event, events.Judged) and event.decision.errno and event.when in first_denials)
    ]
    if len(chosen) > MOST_MARKS:
        chosen = [*chosen[: MOST_MARKS - 1], chosen[-1]]  # the end is never left out
    return [Mark(number, event, line_of(event) or "", _kind_of(event)) for number, event in enumerate(chosen, 1)]


def _kind_of(event: Event) -> str:
    if isinstance(event, (*_BAD, events.Judged)):
        return "bad"
    return "doubtful" if isinstance(event, _DOUBTFUL) else "good"


def draw(summary: Summary, marks: Sequence[Mark]) -> str:
    """Return the picture as an ``svg`` element, to be styled by the page's classes."""
    return "\n".join(_Picture(summary, marks).lines())


class _Picture:
    def __init__(self, summary: Summary, marks: Sequence[Mark]) -> None:
        self.summary = summary
        self.marks = marks
        self.end = max(summary.length, 1e-3) * 1.02

    def x(self, when: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * min(max(when, 0.0), self.end) / self.end, 1)

    def lines(self) -> Iterator[str]:
        body: list[str] = []
        y = 26
        body += self._roots(y)
        y += _LANE + 8
        for life in self.summary.policies[:_MOST_POLICIES]:
            body += self._policy(life, y)
            y += _LANE
        body += self._executions(y)
        y += _LANE + 8
        placed, rows = self._placed()
        body += self._marks(placed, y)
        y += rows * (2 * _MARK + 4) + 10
        yield (
            f'<svg viewBox="0 0 {WIDTH} {y + 8}" role="img" aria-label="Timeline of the boot"'
            ' xmlns="http://www.w3.org/2000/svg">'
        )
        yield from self._axis(y)
        yield from body
        yield "</svg>"

    def _axis(self, bottom: float) -> Iterator[str]:
        step = _nice_step(self.end)
        for number in range(int(self.end / step) + 1):
            x = self.x(number * step)
            yield f'<line class="grid" x1="{x}" y1="18" x2="{x}" y2="{bottom}"/>'
            yield f'<text class="tick" x="{x}" y="12" text-anchor="middle">{number * step:.6g} s</text>'

    def _roots(self, y: float) -> Iterator[str]:
        yield _label("root file system", y)
        switches = [event.when for event in self.summary.events if isinstance(event, events.SwitchedRoot)]
        switch = switches[0] if switches else None
        end = self.x(self.summary.length)
        middle = end if switch is None else self.x(switch)
        yield _bar("initramfs", self.x(0), middle, y, 20)
        yield _inside("initramfs", self.x(0), middle, y)
        if switch is not None:
            yield _bar("real-root", middle, end, y, 20)
            yield _inside("real root", middle, end, y)

    def _policy(self, life: PolicyLife, y: float) -> Iterator[str]:
        name = printable(f"{life.name} {life.version}")
        shortened = name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
        yield _label(shortened, y, title=name)
        end = self.summary.length
        yield _bar(
            "loaded", self.x(life.loaded or 0.0), self.x(end if life.deleted is None else life.deleted), y + 7, 6
        )
        for start, stop in life.active:
            left, right = self.x(start), self.x(end if stop is None else stop)
            yield _bar("active", left, right, y, 20)
            yield _inside("in force", left, right, y)

    def _executions(self, y: float) -> Iterator[str]:
        yield _label("executions", y)
        allowed, denied = set(), set()
        for event in self.summary.events:
            if not isinstance(event, events.Judged):
                continue
            if event.decision.errno:
                denied.add(round(self.x(event.when)))
            elif event.hook is Hook.BPRM_CHECK:
                allowed.add(round(self.x(event.when)))
        for x in sorted(allowed):
            yield f'<line class="allowed" x1="{x}" y1="{y + 6}" x2="{x}" y2="{y + 18}"/>'
        for x in sorted(denied):
            yield f'<line class="denied" x1="{x}" y1="{y}" x2="{x}" y2="{y + 22}"/>'

    def _placed(self) -> tuple[list[tuple[Mark, float, int]], int]:
        """Give each mark the topmost row where it touches no other."""
        ends: list[float] = []
        placed = []
        for mark in self.marks:
            x = self.x(mark.event.when)
            row = next((row for row, end in enumerate(ends) if x - end > 2 * _MARK + 2), len(ends))
            ends[row : row + 1] = [x]
            placed.append((mark, x, row))
        return placed, max(1, len(ends))

    def _marks(self, placed: Sequence[tuple[Mark, float, int]], y: float) -> Iterator[str]:
        yield _label("what happened", y)
        for mark, x, row in placed:
            middle = y + _MARK + 1 + row * (2 * _MARK + 4)
            yield (
                f'<g class="mark {mark.kind}"><title>{escape(printable(mark.text))}</title>'
                f'<circle cx="{x}" cy="{middle}" r="{_MARK}"/>'
                f'<text x="{x}" y="{middle + 3.5}" text-anchor="middle">{mark.number}</text></g>'
            )


def _nice_step(length: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten, of which about eight make the length."""
    power = 10.0 ** math.floor(math.log10(length / 8))
    return next(power * factor for factor in (1, 2, 5, 10) if length / (power * factor) <= 10)


def _label(text: str, y: float, *, title: str | None = None) -> str:
    inner = "" if title is None else f"<title>{escape(title)}</title>"
    return f'<text class="label" x="{_LEFT - 12}" y="{y + 14}" text-anchor="end">{inner}{escape(text)}</text>'


def _bar(kind: str, left: float, right: float, y: float, height: float) -> str:
    return f'<rect class="{kind}" x="{left}" y="{y}" width="{max(right - left, 1.5):.1f}" height="{height}" rx="3"/>'


def _inside(text: str, left: float, right: float, y: float) -> str:
    """Write on a bar, if there is room."""
    if right - left < 8 * len(text):
        return ""
    return f'<text class="inside" x="{(left + right) / 2:.1f}" y="{y + 14}" text-anchor="middle">{escape(text)}</text>'
