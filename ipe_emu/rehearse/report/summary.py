"""What a boot came to, as values: all that a report says, before it has a form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen

from ipe_emu.event import File, Hook
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.lsm import UpstreamRefusal
from ipe_emu.policy.explain import deciding_statement, in_words
from ipe_emu.policy.rule import Operation, Policy
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report import faults, remarks
from ipe_emu.rehearse.report.faults import Standing
from ipe_emu.rehearse.report.phase_change import Affected, affected_by
from ipe_emu.rehearse.verdict import Result, Verdict, verdict
from ipe_emu.rehearse.words import line_of, shown


@frozen
class Step:
    """Something that was done to a policy: when (seconds), by whom (in words), and what."""

    when: float
    by: str
    what: str


@frozen
class PolicyLife:
    """A policy from the moment it was loaded; ``loaded`` is None for the one that was there from the first.

    ``active`` holds the spans, in seconds, during which it was in force; a span that has no end lasted to the end.
    """

    name: str
    version: str
    signed: bool
    steps: tuple[Step, ...]
    loaded: float | None
    deleted: float | None
    active: tuple[tuple[float, float | None], ...]


@frozen
class Denial:
    """Executions and the like that were denied, each for the same reason.

    ``first`` is when it happened first, in seconds; ``by`` the line of the policy that decided, ``reasons`` how it came
    to that, ``facts`` what is known of the file. ``name`` is the mistake that is behind it.
    """

    name: str
    operation: Operation
    hook: Hook
    file: File | None
    policy: str
    by: str
    facts: tuple[str, ...]
    reasons: tuple[str, ...]
    first: float
    programs: tuple[str, ...]
    times: int


@frozen
class FailedWrite:
    """A write to the securityfs that failed, and the mistake that is behind it."""

    name: str
    event: events.ControlFailed


@frozen
class Summary:
    """A whole boot. ``headline`` is the first line of every report: the result, and the fault by its name."""

    headline: str
    verdict: Verdict
    started: events.Started | None
    length: float
    policies: tuple[PolicyLife, ...]
    active_at_end: str | None
    denials: tuple[Denial, ...]
    failed_writes: tuple[FailedWrite, ...]
    affected: tuple[Affected, ...]
    warnings: tuple[str, ...]
    not_emulated: tuple[str, ...]
    refusals: tuple[UpstreamRefusal, ...]
    executions: int
    events: tuple[Event, ...] = field(repr=False)


def summarise(happened: Sequence[Event], refusals: Sequence[UpstreamRefusal] = ()) -> Summary:
    """Make a summary of all that happened in a boot, and of what a released kernel would have refused."""
    judged = verdict(happened)
    series = faults.series_of_writes(happened)
    started = next((event for event in happened if isinstance(event, events.Started)), None)
    standings = list(_standings(happened))
    final = standings[-1][1].policy if standings else None
    length = max((event.when for event in happened), default=0.0)
    return Summary(
        headline=_headline(judged, standings, series),
        verdict=judged,
        started=started,
        length=length,
        policies=_lives(happened),
        active_at_end=None if final is None else _called(final),
        denials=_denials(standings),
        failed_writes=tuple(
            FailedWrite(faults.of_write(event, series), event)
            for event in happened
            if isinstance(event, events.ControlFailed)
        ),
        affected=affected_by(final, standings),
        warnings=tuple(remarks.warnings(happened, final)),
        not_emulated=_not_emulated(happened),
        refusals=tuple(refusals),
        executions=sum(_is_execution(event) for event in happened),
        events=tuple(happened),
    )


def facts_in_words(facts: Facts) -> list[str]:
    """Say what is known of a file, one thing a line."""
    found = []
    if facts.boot_verified:
        found.append("on the initramfs (boot_verified)")
    if facts.dmverity_roothash is not None:
        signed = "with" if facts.dmverity_signature else "without"
        found.append(f"on a dm-verity volume, root hash {facts.dmverity_roothash}, {signed} a trusted signature")
    if facts.fsverity_digest is not None:
        signed = "with" if facts.fsverity_signature else "without"
        found.append(f"sealed by fs-verity, digest {facts.fsverity_digest}, {signed} a trusted signature")
    return found or ["nothing that a policy could name"]


def _called(policy: Policy) -> str:
    return f"{policy.name} {policy.version}"


def _is_execution(event: Event) -> bool:
    return isinstance(event, events.Judged) and event.hook is Hook.BPRM_CHECK


def _standings(happened: Iterable[Event]) -> Iterable[tuple[Event, Standing]]:
    """Yield each event with what was in force when it happened; an event that changes that, with what it brought."""
    policy: Policy | None = None
    switched = False
    for event in happened:
        match event:
            case events.Started() | events.PolicyActivated():
                policy = event.policy
            case events.PolicyLoaded() if event.active:
                policy = event.policy
            case events.SwitchedRoot():
                switched = True
        yield event, Standing(policy, switched)


def _headline(judged: Verdict, standings: Sequence[tuple[Event, Standing]], series: Mapping[int, int]) -> str:
    name = None
    if judged.result is Result.PROGRAM_FAILED:
        images = (event for event, _ in standings if isinstance(event, events.ImageUnpacked))
        name = next((f"the image was not unpacked: {image.fault}" for image in images if image.fault), None)
        messages = (event for event, _ in standings if isinstance(event, events.Message))
        name = name or next(filter(None, map(faults.of_message, messages)), None)
    if name is None:
        name = next((_name_of(event, standing, series) for event, standing in standings if event is judged.event), None)
    return ": ".join(part for part in (judged.result.value, name, judged.reason) if part)


def _name_of(event: Event, standing: Standing, series: Mapping[int, int]) -> str | None:
    match event:
        case events.ControlFailed():
            return faults.of_write(event, series)
        case events.Judged():
            return faults.of_denial(event, standing)
        case events.Panicked() | events.Rebooted():
            return faults.of_end(event)
    return None


def _denials(standings: Sequence[tuple[Event, Standing]]) -> tuple[Denial, ...]:
    groups: dict[tuple[object, ...], list[tuple[events.Judged, Standing]]] = {}
    for event, standing in standings:
        if isinstance(event, events.Judged) and event.decision.errno:
            path = None if event.file is None else (event.file.path, event.file.dev, event.file.facts)
            groups.setdefault((event.operation, event.hook, path, standing.policy), []).append((event, standing))
    return tuple(_denial(group) for group in groups.values())


def _denial(group: Sequence[tuple[events.Judged, Standing]]) -> Denial:
    event, standing = group[0]
    facts = NO_FACTS if event.file is None else event.file.facts
    policy, decided = standing.policy, event.decision.verdict
    return Denial(
        name=faults.of_denial(event, standing),
        operation=event.operation,
        hook=event.hook,
        file=event.file,
        policy="" if policy is None else _called(policy),
        by="" if decided is None else deciding_statement(decided),
        facts=() if event.file is None else tuple(facts_in_words(facts)),
        reasons=() if policy is None else tuple(in_words(policy, event.operation, facts)),
        first=event.when,
        programs=tuple(dict.fromkeys(shown(one.by.comm) for one, _ in group if one.by is not None)),
        times=len(group),
    )


def _lives(happened: Iterable[Event]) -> tuple[PolicyLife, ...]:
    lives = _Lives()
    for event in happened:
        lives.tell(event)
    return tuple(lives.done)


class _Lives:
    """Follows policies through the events. One that is deleted and loaded again has two lives."""

    def __init__(self) -> None:
        self.done: list[PolicyLife] = []
        self._at: dict[str, int] = {}
        self._active: str | None = None

    def tell(self, event: Event) -> None:
        match event:
            case events.Started() if event.policy is not None:
                self._add(event.policy, None, signed=False)
                self._activate(event.policy.name, event.when)
            case events.PolicyLoaded():
                if event.updated and event.policy.name in self._at:
                    self._step(event, f"updated to {event.policy.version}", event.policy.name)
                    self._change(event.policy.name, version=str(event.policy.version), signed=event.signed)
                else:
                    self._add(event.policy, event.when, signed=event.signed)
                    self._step(event, "loaded", event.policy.name)
            case events.PolicyActivated():
                self._activate(event.policy.name, event.when)
                self._step(event, "activated", event.policy.name)
            case events.PolicyDeleted():
                self._step(event, "deleted", event.name)
                self._change(event.name, deleted=event.when)
                self._at.pop(event.name, None)

    def _add(self, policy: Policy, when: float | None, *, signed: bool) -> None:
        self._at[policy.name] = len(self.done)
        self.done.append(PolicyLife(policy.name, str(policy.version), signed, (), when, None, ()))

    def _step(self, event: Event, what: str, name: str) -> None:
        if name in self._at:
            by = "?" if event.by is None else f"{shown(event.by.comm)} (pid {event.by.pid})"
            life = self.done[self._at[name]]
            self._change(name, steps=(*life.steps, Step(event.when, by, what)))

    def _activate(self, name: str, when: float) -> None:
        if self._active == name:
            return
        if self._active in self._at:
            before = self.done[self._at[self._active]]
            *spans, (start, _) = before.active
            self._change(self._active, active=(*spans, (start, when)))
        if name in self._at:
            self._change(name, active=(*self.done[self._at[name]].active, (when, None)))
        self._active = name

    def _change(self, name: str, **changes: Any) -> None:  # noqa: ANN401 - any field has its own type
        if name in self._at:
            place = self._at[name]
            self.done[place] = evolve(self.done[place], **changes)


def _not_emulated(happened: Iterable[Event]) -> tuple[str, ...]:
    kinds = events.NotJudged | events.NotDone | events.Failed
    lines = [line_of(event) for event in happened if isinstance(event, kinds)]
    lines += [line_of(event) for event in happened if isinstance(event, events.Mounted) and event.note]
    return tuple(dict.fromkeys(line for line in lines if line))
