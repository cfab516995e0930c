"""What a rehearsed boot comes to."""

import enum
from collections.abc import Sequence

from attrs import frozen

from ipe_emu.rehearse.events import (
    RESTARTED_ITSELF,
    CommandEnded,
    ControlFailed,
    Event,
    Failed,
    ImageUnpacked,
    Interrupted,
    Judged,
    NotJudged,
    Panicked,
    Rebooted,
    SwitchedRoot,
    TimedOut,
)
from ipe_emu.rehearse.words import line_of


class Result(enum.Enum):
    """Whether what happened is what a user hopes for; the first that holds counts."""

    NOT_JUDGED = "something could not be judged"
    DENIED = "the policy failed it"
    INTERRUPTED = "interrupted"
    PROGRAM_FAILED = "the machine failed for its own reasons"
    AS_EXPECTED = "as expected"


@frozen
class Verdict:
    """The result, and the event that decided it (None if there is none), also in words."""

    result: Result
    reason: str
    event: Event | None = None


def verdict(events: Sequence[Event]) -> Verdict:
    """Judge a whole boot. What was not judged counts most: it could have been anything."""
    for result, decides in _DECIDING:
        for event in events:
            if decides(event):
                return Verdict(result, line_of(event) or "", event)
    ends = [event for event in events if isinstance(event, Rebooted | SwitchedRoot | CommandEnded)]
    if not ends:  # nothing says how it ended
        return Verdict(Result.NOT_JUDGED, "nobody saw the end of the machine")
    return Verdict(Result.AS_EXPECTED, line_of(ends[-1]) or "", ends[-1])


def fails(event: Event) -> bool:
    """Whether the policy, or the emulator, failed a call: what a person wants to look at where it happens."""
    return _denied(event) or isinstance(event, NotJudged)


def _crashed(event: Event) -> bool:
    return (
        isinstance(event, Panicked | TimedOut)
        or (isinstance(event, Rebooted) and event.how in ("crashed", RESTARTED_ITSELF))
        or (isinstance(event, CommandEnded) and event.status != 0)
    )


def _denied(event: Event) -> bool:
    return isinstance(event, ControlFailed) or (isinstance(event, Judged) and event.decision.errno != 0)


def _unknown(event: Event) -> bool:
    return isinstance(event, NotJudged | Failed) or (isinstance(event, ImageUnpacked) and not event.exact)


def _interrupted(event: Event) -> bool:
    return isinstance(event, Interrupted)


_DECIDING = (
    (Result.NOT_JUDGED, _unknown),
    (Result.DENIED, _denied),
    (Result.INTERRUPTED, _interrupted),
    (Result.PROGRAM_FAILED, _crashed),
)
