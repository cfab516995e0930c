"""The phase change: what ran under an earlier policy, and would be denied under the one that is in force at the end.

Mostly the initramfs's own programs, which boot_verified allowed: whoever is still running then cannot execute them
again, nor a shell its tools.
"""

from collections.abc import Iterable, Sequence

from attrs import evolve, frozen

from ipe_emu.event import File, Hook
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.explain import deciding_statement, in_words
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.rule import Action, Operation, Policy
from ipe_emu.rehearse.events import Event, Judged
from ipe_emu.rehearse.report.faults import Standing


@frozen
class Affected:
    """A file that was used, and could not be used again: by which hook, what allowed it, and why it is denied at last.

    ``only_boot_verified``: nothing but its being on the initramfs allowed it.
    """

    operation: Operation
    hook: Hook
    file: File
    allowed_by: str
    reasons: tuple[str, ...]
    only_boot_verified: bool
    times: int = 1


def affected_by(final: Policy | None, standings: Sequence[tuple[Event, Standing]]) -> tuple[Affected, ...]:
    """Find what ``final`` denies among all that was allowed before, each file once."""
    if final is None:
        return ()
    index = RuleIndex(final)
    found: dict[tuple[object, ...], Affected] = {}
    for event, standing in standings:
        if not isinstance(event, Judged) or event.file is None or event.decision.errno or standing.policy is final:
            continue
        facts = event.file.facts
        if evaluate(index, event.operation, facts).action is Action.ALLOW:
            continue
        key = (event.operation, event.hook, event.file.path, event.file.dev, facts)
        if key in found:
            found[key] = evolve(found[key], times=found[key].times + 1)
            continue
        decided = event.decision.verdict
        found[key] = Affected(
            event.operation,
            event.hook,
            event.file,
            "no policy was active" if decided is None else deciding_statement(decided),
            tuple(in_words(final, event.operation, facts)),
            _rests_on_boot_verified(event, standing.policy),
        )
    return tuple(found.values())


def by_file(affected: Iterable[Affected]) -> list[list[Affected]]:
    """Put together what is about one file."""
    files: dict[tuple[bytes, str], list[Affected]] = {}
    for one in affected:
        files.setdefault((one.file.path, one.file.dev), []).append(one)
    return [*files.values()]


def headline(affected: Iterable[Affected], final: str) -> str:
    """Say how many files are affected by the last policy, ``final``."""
    files = by_file(affected)
    alone = sum(all(one.only_boot_verified for one in ones) for ones in files)
    return (
        f"{len(files)} file(s) ran and would be denied under {final} if they ran again, {alone} of them because"
        " boot_verified alone allowed them"
    )


def _rests_on_boot_verified(event: Judged, policy: Policy | None) -> bool:
    if policy is None or event.file is None or not event.file.facts.boot_verified:
        return False
    without = evolve(event.file.facts, boot_verified=False)
    return evaluate(RuleIndex(policy), event.operation, without).action is Action.DENY
