"""Warnings: what went as it had to, and yet is hardly what somebody wants."""

from collections.abc import Iterator, Mapping, Sequence

from ipe_emu.event import Hook
from ipe_emu.kernel_cmdline import words
from ipe_emu.policy.rule import Policy
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report import faults
from ipe_emu.rehearse.words import shown


def warnings(happened: Sequence[Event], final: Policy | None) -> Iterator[str]:
    """Yield what a person should know, most severe first."""
    yield from _image(happened)
    if final is None:
        yield "no policy is active at the end: everything is allowed, and nothing is audited"
    for event in happened:
        if isinstance(event, events.ShellOpened):
            yield f"after {event.when:.3f} s the machine was stopped for a shell: what followed may be its doing"
    yield from _corruption(happened)
    yield from _enforcement(happened)
    series = faults.series_of_writes(happened)
    yield from _ignored_failures(happened, series)
    yield from _pieces(happened, series)
    yield from _replaced_signed(happened)
    yield from _line_ends(happened)
    yield from _command_line(happened)


def _image(happened: Sequence[Event]) -> Iterator[str]:
    for event in happened:
        if not isinstance(event, events.ImageUnpacked):
            continue
        if event.fault is not None:
            yield f"the kernel stops unpacking the image, and boots what is there: {event.fault}"
        if event.cut is not None and event.fault is None:
            yield f"the image ends within {event.cut}, and the kernel says nothing of it"
        yield from event.left_out
        yield from event.differences


def _corruption(happened: Sequence[Event]) -> Iterator[str]:
    messages = (event for event in happened if isinstance(event, events.Message))
    yield from dict.fromkeys(f"{name}: {event.text}" for event in messages if (name := faults.of_message(event)))


def _enforcement(happened: Sequence[Event]) -> Iterator[str]:
    enforce = True
    for event in happened:
        match event:
            case events.Started():
                enforce = event.enforce
                if not enforce:
                    yield "the machine starts permissive (enforce=0): denials are recorded, and not carried out"
            case events.EnforceChanged():
                enforce = event.enforce
                if not enforce:
                    who = "?" if event.by is None else shown(event.by.comm)
                    yield f"enforcement was switched off (by {who}, after {event.when:.3f} s)"
    waived = sum(
        isinstance(event, events.Judged)
        and not event.decision.errno
        and event.decision.verdict is not None
        and event.decision.verdict.action.value == "DENY"
        for event in happened
    )
    if waived:
        yield f"{waived} denial(s) were not carried out, for enforcement was off"
    if not enforce:
        yield "enforcement is off at the end"


def _ignored_failures(happened: Sequence[Event], series: Mapping[int, int]) -> Iterator[str]:
    """A loader that failed and exited with 0: the boot goes on, and what it wrote was never loaded."""
    switched = False
    for place, event in enumerate(happened):
        switched = switched or isinstance(event, events.SwitchedRoot)
        if not isinstance(event, events.ControlFailed):
            continue
        later = happened[place + 1 :]
        if any(_makes_good(event, other) for other in later):
            continue
        went_on = next((other for other in later if isinstance(other, events.SwitchedRoot)), None)
        if went_on is not None:
            yield (
                f"{faults.of_write(event, series)}: writing {event.node} failed, and the boot went on to its real root"
                " as if it had not: the loader must end with an error, and init must look at it"
            )
            return
        # In the real root there is no such step to tell by: that much went on there is all that can be said.
        followed = sum(isinstance(other, events.Judged) and other.hook is Hook.BPRM_CHECK for other in later)
        if switched and followed:
            yield (
                f"{faults.of_write(event, series)}: writing {event.node} failed, nobody made it good, and {followed}"
                " execution(s) followed in the real root: the loader must end with an error, and who started it must"
                " look at it"
            )
            return


def _makes_good(failed: events.ControlFailed, later: Event) -> bool:
    if failed.node.endswith("active"):
        return isinstance(later, events.PolicyActivated)
    if failed.node.endswith(("new_policy", "update")):
        return isinstance(later, events.PolicyLoaded)
    return isinstance(later, events.PolicyDeleted | events.EnforceChanged)


def _pieces(happened: Sequence[Event], series: Mapping[int, int]) -> Iterator[str]:
    failed = (event for event in happened if isinstance(event, events.ControlFailed))
    yield from dict.fromkeys(text for event in failed if (text := faults.in_pieces(event, series)))
    for event in happened:
        if isinstance(event, events.PolicyLoaded) and id(event) in series:
            policy = event.policy
            yield f"the policy {policy.name} {policy.version} that was loaded is only the first piece of one"


def _replaced_signed(happened: Sequence[Event]) -> Iterator[str]:
    signed: dict[str, bool] = {}
    for event in happened:
        if isinstance(event, events.PolicyLoaded):
            if event.updated and signed.get(event.policy.name) and not event.signed:
                yield f"an unsigned policy replaced a signed one: {event.policy.name} {event.policy.version}"
            signed[event.policy.name] = event.signed


def _line_ends(happened: Sequence[Event]) -> Iterator[str]:
    for event in happened:
        if isinstance(event, events.PolicyLoaded) and event.signed and b"\r\n" in event.text:
            yield (
                f"the policy {event.policy.name} has lines that end in CRLF: openssl without -binary makes them when it"
                " signs. The kernel takes them, but the text, and every hash of it, is not the file's"
            )


def _command_line(happened: Sequence[Event]) -> Iterator[str]:
    for event in happened:
        if isinstance(event, events.Started):
            given = {
                word.partition(b"=")[0]: word.partition(b"=")[2]
                for word in words(event.cmdline.encode(errors="surrogateescape"))
            }
            if given.get(b"audit") in {b"0", b"off"}:
                yield "audit=0 on the command line: a kernel would record no denial, nor that a policy was loaded"
