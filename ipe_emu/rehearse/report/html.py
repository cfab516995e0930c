"""The report as one HTML page that needs nothing else: no script, no picture, no font from anywhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Final, TypeVar

from ipe_emu.event import File
from ipe_emu.profiles import UPSTREAM_OF_OP_POLICY
from ipe_emu.rehearse.report.phase_change import Affected, headline
from ipe_emu.rehearse.report.picture import MOST_MARKS, draw, marks_of
from ipe_emu.rehearse.report.printable import printable
from ipe_emu.rehearse.report.summary import Denial, FailedWrite, PolicyLife, Summary
from ipe_emu.rehearse.verdict import Result
from ipe_emu.rehearse.words import line_of, shown

_Entry = TypeVar("_Entry")

#: Entries of one kind on the page; the JSON has them all.
_MOST: Final = 200
_MOST_LOGGED: Final = 2000
_BADGES: Final = {
    Result.AS_EXPECTED: ("good", "as expected"),
    Result.DENIED: ("bad", "failed by the policy"),
    Result.INTERRUPTED: ("doubtful", "interrupted"),
    Result.PROGRAM_FAILED: ("bad", "the machine failed"),
    Result.NOT_JUDGED: ("doubtful", "not judged"),
}
_STYLE: Final = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1d2330; --soft: #5c6575; --line: #d9dee7; --panel: #f5f7fa;
  --good: #1a7f4b; --bad: #c0392b; --doubt: #b06f00; --accent: #2f5fb3; --initramfs: #8fb8c9; --real: #8b93d6;
  --loaded: #b9c6de; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171d; --fg: #e4e8ef; --soft: #9aa4b5; --line: #323947;
  --panel: #1c212a; --good: #4cc38a; --bad: #ff7b6b; --doubt: #f0b34d; --accent: #7aa7f7; --initramfs: #3f6b7d;
  --real: #545ca8; --loaded: #46536c; --on: #14171d; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1100px; padding: 24px 20px 60px; }
h1 { font-size: 1.25rem; margin: 0 0 .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem;
  }
.badge { border-radius: 4px; color: var(--on); display: inline-block; font-size: .85rem; font-weight: 600;
  margin-bottom: .6rem; padding: .1rem .55rem; }
.badge.good { background: var(--good); } .badge.bad { background: var(--bad); }
  .badge.doubtful { background: var(--doubt); }
.about { color: var(--soft); overflow-wrap: anywhere; } .about code { color: var(--fg); }
.picture { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0 .5rem;
  overflow-x: auto; padding: 10px; }
svg { display: block; min-width: 760px; width: 100%; } svg text { fill: var(--fg); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--soft); font-size: 11px; } svg .inside { font-size: 11.5px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .initramfs { fill: var(--initramfs); } svg .real-root { fill: var(--real); } svg .loaded { fill: var(--loaded); }
svg .active { fill: var(--accent); } svg .active + .inside { fill: var(--on); }
svg .allowed { stroke: var(--good); stroke-width: 1; } svg .denied { stroke: var(--bad); stroke-width: 2.5; }
svg .mark circle { fill: var(--accent); } svg .mark.bad circle { fill: var(--bad); }
svg .mark.doubtful circle { fill: var(--doubt); } svg .mark text { fill: var(--on); font-size: 10.5px;
  font-weight: 600; }
.key span { margin-right: 1.2rem; white-space: nowrap; } .key { color: var(--soft); font-size: .85rem; }
.key i { border-radius: 2px; display: inline-block; height: 10px; margin-right: .35rem; width: 18px; }
.key i.tick { border-radius: 0; height: 12px; vertical-align: -1px; width: 3px; }
table { border-collapse: collapse; width: 100%; } td, th { border-top: 1px solid var(--line);
  padding: .3rem .7rem .3rem 0;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 500; }
td.n { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bad, .name.bad { color: var(--bad); } td.doubtful { color: var(--doubt); }
details, .card { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer;
  overflow-wrap: anywhere; }
details > ul, .card > ul { margin: .3rem 0 .3rem; } code { font: .88em ui-monospace, monospace;
  overflow-wrap: anywhere; }
.name { font-weight: 600; } ul { padding-left: 1.3rem; } li { margin: .15rem 0; } .none { color: var(--soft); }
"""


def page(summary: Summary) -> str:
    """Return the page. Everything that comes from an image is escaped."""
    return "\n".join(_page(summary)) + "\n"


def _page(summary: Summary) -> Iterator[str]:
    marks = marks_of(summary)
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>ipe-emu boot: {_text(summary.verdict.result.value)}</title><style>{_STYLE}</style></head><body>"
    kind, badge = _BADGES[summary.verdict.result]
    yield f'<div class="badge {kind}">{badge}</div><h1>{_text(summary.headline)}</h1>'
    yield from _about(summary)
    yield f'<div class="picture">{draw(summary, marks)}</div>'
    yield _KEY
    yield "<h2>What happened</h2>"
    yield from _table(
        ("", "after", "what"),
        (
            (f"<td class=n>{m.number}", f"<td class=n>{m.event.when:.3f} s", f"<td class={m.kind}>{_text(m.text)}")
            for m in marks
        ),
    )
    if len(marks) == MOST_MARKS:
        yield '<p class="none">There may be more: see all events below.</p>'
    yield from _section("Warnings", summary.warnings)
    yield "<h2>Denied</h2>"
    yield from _all(summary.denials, _denial, "Nothing was denied.")
    if summary.failed_writes:
        yield "<h2>Failed writes to the securityfs</h2>"
        yield from _all(summary.failed_writes, _failed_write, "")
    yield from _phase_change(summary)
    yield "<h2>Policies</h2>"
    yield from _all(summary.policies, _policy, "There were none.")
    yield from _section("Not emulated, or not judged", summary.not_emulated)
    yield from _refusals(summary)
    yield from _log(summary)
    yield "</body></html>"


_KEY: Final = (
    '<p class="key">'
    '<span><i style="background: var(--loaded)"></i>policy loaded</span>'
    '<span><i style="background: var(--accent)"></i>policy in force</span>'
    '<span><i class="tick" style="background: var(--good)"></i>execution</span>'
    '<span><i class="tick" style="background: var(--bad)"></i>denied</span></p>'
)


def _about(summary: Summary) -> Iterator[str]:
    started = summary.started
    kernel = "" if started is None else f"Kernel {_text(started.kernel)}. "
    yield (
        f'<div class="about">{kernel}{summary.length:.3f} s, {summary.executions} execution(s), active at the end:'
        f" {_text(summary.active_at_end or 'no policy')}."
    )
    if started is not None and started.cmdline:
        yield f"<br>Command line: <code>{_text(started.cmdline)}</code>"
    yield "</div>"


def _denial(denial: Denial) -> Iterator[str]:
    times = f", {denial.times} times" if denial.times > 1 else ""
    yield (
        f'<details open><summary><span class="name bad">{_text(denial.name)}</span><br>'
        f"<code>{_named(denial.file)}</code> — {denial.operation.value}, {denial.hook.value},"
        f" after {denial.first:.3f} s{times}</summary><ul>"
    )
    yield f"<li>decided by <code>{_text(denial.by)}</code> of {_text(denial.policy)}</li>"
    yield f"<li>asked by {_text(', '.join(denial.programs) or '?')}</li>"
    yield from (f"<li>the file: {_text(fact)}</li>" for fact in denial.facts)
    yield from (f"<li>{_text(reason)}</li>" for reason in denial.reasons)
    yield "</ul></details>"


def _failed_write(failed: FailedWrite) -> Iterator[str]:
    event = failed.event
    yield (
        f'<div class="card"><span class="name bad">{_text(failed.name)}</span><br><code>{_text(event.node)}</code> —'
        f" {event.size} bytes, after {event.when:.3f} s<br>{_text(line_of(event) or '')}</div>"
    )


def _phase_change(summary: Summary) -> Iterator[str]:
    if not summary.affected:
        return
    yield "<h2>The phase change</h2>"
    yield f"<p>{_text(headline(summary.affected, summary.active_at_end or '?'))}.</p>"
    yield from _all(summary.affected, _affected, "")


def _affected(one: Affected) -> Iterator[str]:
    yield (
        f"<details><summary><code>{_named(one.file)}</code> — {one.operation.value}, {one.hook.value}, allowed by"
        f" <code>{_text(one.allowed_by)}</code></summary><ul>"
    )
    yield from (f"<li>{_text(reason)}</li>" for reason in one.reasons)
    yield "</ul></details>"


def _policy(life: PolicyLife) -> Iterator[str]:
    kind = "there from the first" if life.loaded is None else "signed" if life.signed else "unsigned"
    yield f'<div class="card"><span class="name">{_text(life.name)} {_text(life.version)}</span>, {kind}<ul>'
    yield from (f"<li>{_text(step.what)} after {step.when:.3f} s by {_text(step.by)}</li>" for step in life.steps)
    yield "</ul></div>"


def _refusals(summary: Summary) -> Iterator[str]:
    if summary.refusals:
        yield f"<h2>Done here, refused by {_text(UPSTREAM_OF_OP_POLICY.name)}</h2><ul>"
        yield from (f"<li>{_text(one.what)}: {_text(one.answer)}</li>" for one in summary.refusals[:_MOST])
        yield from _more(summary.refusals, _MOST, "li")
        yield "</ul>"


def _log(summary: Summary) -> Iterator[str]:
    logged = [(event, line) for event in summary.events if (line := line_of(event)) is not None]
    yield f"<h2>All events</h2><details><summary>{len(logged)} line(s)</summary>"
    rows = (
        (f"<td class=n>{event.when:.6f}", f"<td><code>{_text(line)}</code>") for event, line in logged[:_MOST_LOGGED]
    )
    yield from _table(("after", "what"), rows)
    yield from _more(logged, _MOST_LOGGED, "p")
    yield "</details>"


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"<h2>{title}</h2><ul>"
        yield from (f"<li>{_text(line)}</li>" for line in lines[:_MOST])
        yield from _more(lines, _MOST, "li")
        yield "</ul>"


def _all(entries: Sequence[_Entry], form: Callable[[_Entry], Iterable[str]], nothing: str) -> Iterator[str]:
    if not entries:
        yield f'<p class="none">{nothing}</p>'
    for entry in entries[:_MOST]:
        yield from form(entry)
    yield from _more(entries, _MOST, "p")


def _more(entries: Sequence[object], most: int, tag: str) -> Iterator[str]:
    if len(entries) > most:
        yield f'<{tag} class="none">and {len(entries) - most} more, which the JSON has</{tag}>'


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    yield from ("<tr>" + "".join(f"{cell}</td>" for cell in row) + "</tr>" for row in rows)
    yield "</table>"


def _named(file: File | None) -> str:
    return "memory without a file" if file is None else f"{_text(shown(file.path))} on {_text(file.dev)}"


def _text(text: str) -> str:
    return escape(printable(text))
