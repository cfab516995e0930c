"""One line of text for each event that a person wants to hear of."""

import os

from ipe_emu.errors import errno_name
from ipe_emu.event import File
from ipe_emu.policy.evaluate import Match
from ipe_emu.policy.render import default_statement, statement
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event, Judged


def line_of(event: Event) -> str | None:
    """Return what happened, without its time; None for what is not worth a line by itself (an allowed execution)."""
    text = _text_of(event)
    by = "" if text is None or event.by is None else f" (by {shown(event.by.comm)}, pid {event.by.pid})"
    return None if text is None else f"{text}{by}"


def _text_of(event: Event) -> str | None:  # noqa: PLR0912 - one answer for each kind of event
    match event:
        case events.Started():
            return None
        case events.ImageUnpacked():
            return None if event.fault is None else f"Initramfs unpacking failed: {event.fault}"
        case events.PolicyLoaded():
            how = "updated" if event.updated else "loaded"
            kind = "signed" if event.signed else "unsigned"
            return f"policy {how}: {event.policy.name} {event.policy.version}, {kind}"
        case events.PolicyActivated():
            instead = f", in the place of {event.before}" if event.before is not None else ""
            return f"policy activated: {event.policy.name} {event.policy.version}{instead}"
        case events.PolicyDeleted():
            return f"policy deleted: {event.name}"
        case events.ControlFailed():
            return f"failed: writing {event.node}: {errno_name(event.errno)}: {event.reason}"
        case events.EnforceChanged():
            return f"enforcement switched {'on' if event.enforce else 'off'}"
        case events.Judged():
            return _judged(event)
        case events.Mounted():
            return f"mounted {event.kind} on {event.target}, {event.note}" if event.note else None
        case events.SwitchedRoot():
            return f"switched to a new root, where {event.program} is executed"
        case events.NotJudged():
            return f"not judged: {event.call}: {event.reason}"
        case events.NotDone():
            return f"not done: {event.call}: {event.what}"
        case events.Message():
            return event.text
        case events.Rebooted():
            return f"{event.how}, by {event.means}"
        case events.Panicked():
            return f"Kernel panic - not syncing: {event.message}"
        case events.CommandEnded():
            if event.status is None:
                return f"the command {event.command!r} was not run to its end"
            return f"the command {event.command!r} returned {event.status}"
        case events.TimedOut():
            return f"still running after {event.seconds:g} s"
        case events.ShellOpened():
            return "a shell was opened, in which the machine can have been changed"
        case events.Interrupted():
            return f"the rehearsal was ended by {event.signal}"
        case events.Failed():
            return f"a part of the emulator failed: {event.what}"


def _judged(event: Judged) -> str | None:
    verdict = event.decision.verdict
    if not event.decision.errno or verdict is None:
        return None
    if verdict.rule is not None:
        by = statement(verdict.rule)
    else:
        by = default_statement(verdict.operation if verdict.match is Match.OPERATION_DEFAULT else None, verdict.action)
    return f"denied: {event.operation.value} {event.hook.value} {_named(event.file)}: {by}"


def _named(file: File | None) -> str:
    return "memory without a file" if file is None else f"{shown(file.path)} on {file.dev}"


def shown(name: bytes) -> str:
    """Return a name for people: what is not printable is escaped."""
    return repr(os.fsdecode(name))[1:-1]
