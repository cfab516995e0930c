"""The report as JSON: everything, for programs. Names of files are escaped as in the text."""

import enum
import json
from typing import Any

import attrs

from ipe_emu.errors import errno_name
from ipe_emu.event import File
from ipe_emu.integrity.facts import Facts
from ipe_emu.lsm import Decision
from ipe_emu.policy.explain import deciding_statement
from ipe_emu.policy.rule import Policy
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report.printable import printable
from ipe_emu.rehearse.report.summary import Summary
from ipe_emu.rehearse.words import line_of, shown

#: Raised when a field changes its meaning or goes; new ones may come at any time.
VERSION = 1


def dump(summary: Summary, *, status: int) -> str:
    """Return the report as one JSON object; ``status`` is what the program exits with."""
    started = summary.started
    report = {
        "version": VERSION,
        "status": status,
        "result": summary.verdict.result.name.lower().replace("_", "-"),
        "headline": summary.headline,
        "kernel": None if started is None else started.kernel,
        "cmdline": None if started is None else started.cmdline,
        "seconds": summary.length,
        "executions": summary.executions,
        "active_at_end": summary.active_at_end,
        "policies": summary.policies,
        "denials": summary.denials,
        "failed_writes": [{"name": failed.name, **_event(failed.event)} for failed in summary.failed_writes],
        "phase_change": summary.affected,
        "warnings": summary.warnings,
        "not_emulated": summary.not_emulated,
        "refused_by_released_kernels": summary.refusals,
        "events": [_event(event) for event in summary.events],
    }
    return json.dumps(_plain(report), indent=1, ensure_ascii=True)


def _event(event: Event) -> dict[str, Any]:
    fields = {field.name: getattr(event, field.name) for field in attrs.fields(type(event))}
    return {"event": type(event).__name__, "text": line_of(event), **fields}


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON holds anything
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return printable(value)
        case bytes():
            return shown(value)
        case enum.Enum():
            return value.value
        case Policy():
            return f"{value.name} {value.version}"
        case File():
            return {"path": shown(value.path), "dev": value.dev, "ino": value.ino, "facts": _plain(value.facts)}
        case Facts():
            return {
                field.name: None
                if (one := getattr(value, field.name)) is None
                else one
                if isinstance(one, bool)
                else str(one)
                for field in attrs.fields(Facts)
            }
        case Decision():
            by = None if value.verdict is None else deciding_statement(value.verdict)
            return {"errno": errno_name(value.errno) if value.errno else None, "by": by}
        case dict():
            return {str(key): _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
    if attrs.has(type(value)):
        return {field.name: _plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    raise TypeError(f"{type(value).__name__} has no form in JSON")
