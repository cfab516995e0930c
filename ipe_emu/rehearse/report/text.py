"""The report as text, for a terminal or a log."""

from collections.abc import Iterable, Iterator, Sequence

from ipe_emu.event import File
from ipe_emu.profiles import UPSTREAM_OF_OP_POLICY
from ipe_emu.rehearse.report.phase_change import by_file, headline
from ipe_emu.rehearse.report.printable import printable
from ipe_emu.rehearse.report.summary import Denial, Summary
from ipe_emu.rehearse.words import shown

#: Entries of one kind that are shown; the JSON has them all.
_MOST_SHOWN = 20
_MOST_AFFECTED = 8


def lines_of(summary: Summary) -> Iterator[str]:
    """Return the report, the headline first. Nothing in it can do anything to a terminal."""
    for line in _lines(summary):
        yield printable(line)


def _lines(summary: Summary) -> Iterator[str]:
    yield summary.headline
    yield from _policies(summary)
    yield from _section("denied", _denials(summary.denials), sum(denial.times for denial in summary.denials))
    yield from _section(
        "failed writes",
        (f"{_at(failed.event.when)} {failed.event.node}: {failed.name}" for failed in summary.failed_writes),
        len(summary.failed_writes),
    )
    yield from _affected(summary)
    yield from _section("warnings", summary.warnings, len(summary.warnings))
    if summary.refusals:
        first = summary.refusals[0]
        kernel = UPSTREAM_OF_OP_POLICY.name
        yield f"done here, refused by {kernel}: {len(summary.refusals)}; the first: {first.what} ({first.answer})"
    yield from _section("not emulated, or not judged", summary.not_emulated, len(summary.not_emulated))


def _policies(summary: Summary) -> Iterator[str]:
    yield f"policies (active at the end: {summary.active_at_end or 'none'}):"
    for life in summary.policies:
        kind = "there from the first" if life.loaded is None else "signed" if life.signed else "unsigned"
        yield f"  {life.name} {life.version}, {kind}"
        for step in life.steps:
            yield f"    {_at(step.when)} {step.what} by {step.by}"


def _denials(denials: Sequence[Denial]) -> Iterator[str]:
    for denial in denials[:_MOST_SHOWN]:
        times = f" ({denial.times} times)" if denial.times > 1 else ""
        what = f"{denial.operation.value} {denial.hook.value} {_named(denial.file)}{times}"
        yield f"{_at(denial.first)} {what}: {denial.name}"
        yield f"    by {denial.by!r} of {denial.policy}; asked by {', '.join(denial.programs) or '?'}"
        yield from (f"    it is {fact}" if fact[:2] == "on" else f"    {fact} is known of it" for fact in denial.facts)
        yield from (f"    {reason}" for reason in denial.reasons)
    yield from _more(denials)


def _affected(summary: Summary) -> Iterator[str]:
    if not summary.affected:
        return
    files = by_file(summary.affected)
    yield f"the phase change: {headline(summary.affected, summary.active_at_end or '?')}:"
    for ones in files[:_MOST_AFFECTED]:
        asked = ", ".join(dict.fromkeys(f"{one.operation.value} {one.hook.value}" for one in ones))
        yield f"  {_named(ones[0].file)} ({asked})"
    if len(files) > _MOST_AFFECTED:
        yield f"  and {len(files) - _MOST_AFFECTED} more (--json and --html list all, with the reasons)"


def _section(title: str, lines: Iterable[str], count: int) -> Iterator[str]:
    if count:
        yield f"{title}: {count}"
        yield from (f"  {line}" for line in lines)


def _more(entries: Sequence[object]) -> Iterator[str]:
    if len(entries) > _MOST_SHOWN:
        yield f"and {len(entries) - _MOST_SHOWN} more"


def _at(when: float) -> str:
    return f"[{when:.3f}]"


def _named(file: File | None) -> str:
    return "memory without a file" if file is None else f"{shown(file.path)} on {file.dev}"
