"""The model of a rehearsed boot, which tells the timeline what is done to it, and by whom."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.lsm import Decision, Ipe, LoadedPolicy, Writer
from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.evaluate import Verdict as EvaluationVerdict
from ipe_emu.policy.rule import Action, Operation
from ipe_emu.rehearse.events import (
    ControlFailed,
    EnforceChanged,
    Judged,
    PolicyActivated,
    PolicyDeleted,
    PolicyLoaded,
    Timeline,
)

#: Bytes of a failed write that are kept: enough to tell what it was the beginning of.
_HEAD: Final = 16


@define(eq=False)
class WatchedIpe(Ipe):
    """An LSM whose policies, switches and decisions are noted in ``timeline``."""

    timeline: Timeline = field(kw_only=True)
    #: Tells of an execution by its subject and file whether it is none of the rehearsed machine's.
    spares: Callable[[Subject, File | None], bool] = field(default=lambda *_: False, init=False)

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        """Decide, and note it."""
        if operation is Operation.EXECUTE and self.spares(subject, file):
            return Decision(0, None)
        decision = super().process_event(operation, hook, subject, file)
        self.timeline.add(Judged(self.timeline.now, subject, operation, hook, file, decision))
        return decision

    def _evaluate(
        self, operation: Operation, hook: Hook, subject: Subject, file: File | None
    ) -> EvaluationVerdict | None:
        """Evaluate; a denial of loading an unsigned policy is no answer of `process_event`, and is noted here."""
        verdict = super()._evaluate(operation, hook, subject, file)
        if hook is Hook.POLICY_LOAD and verdict is not None:
            # Permissive mode waives no signature.
            decision = Decision(errno.EACCES if verdict.action is Action.DENY else 0, verdict)
            self.timeline.add(Judged(self.timeline.now, subject, operation, hook, file, decision))
        return verdict

    def setenforce(self, data: bytes, writer: Writer) -> int:
        """Write ``enforce``, and note a change."""
        before = self.enforce
        with self._noting_failure("enforce", data, writer):
            length = super().setenforce(data, writer)
        if self.enforce != before:
            self.timeline.add(EnforceChanged(self.timeline.now, writer.subject, self.enforce))
        return length

    def setaudit(self, data: bytes, writer: Writer) -> int:
        """Write ``success_audit``, and note a failure."""
        with self._noting_failure("success_audit", data, writer):
            return super().setaudit(data, writer)

    def new_policy(self, data: bytes, writer: Writer) -> int:
        """Load a policy, and note what came of it."""
        before = set(self.policies)
        with self._noting_failure("new_policy", data, writer):
            length = super().new_policy(data, writer)
        for loaded in set(self.policies) - before:
            self._note_loaded(loaded, writer, updated=False)
        return length

    def update(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Replace a policy, and note what came of it."""
        with self._noting_failure(f"policies/{loaded.name}/update", data, writer):
            length = super().update(loaded, data, writer)
        self._note_loaded(loaded, writer, updated=True)
        return length

    def setactive(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Activate a policy, and note what came of it."""
        before = self.active
        with self._noting_failure(f"policies/{loaded.name}/active", data, writer):
            length = super().setactive(loaded, data, writer)
        if before is not loaded:
            policy = loaded.policy
            instead = before.name if before is not None else None
            self.timeline.add(PolicyActivated(self.timeline.now, writer.subject, policy, instead))
        return length

    def delete_policy(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Delete a policy, and note what came of it."""
        with self._noting_failure(f"policies/{loaded.name}/delete", data, writer):
            length = super().delete_policy(loaded, data, writer)
        self.timeline.add(PolicyDeleted(self.timeline.now, writer.subject, loaded.name))
        return length

    def _note_loaded(self, loaded: LoadedPolicy, writer: Writer, *, updated: bool) -> None:
        by, text = writer.subject, self.read_policy(loaded)
        event = PolicyLoaded(
            self.timeline.now, by, loaded.policy, text, loaded.signed, updated, active=loaded is self.active
        )
        self.timeline.add(event)

    @contextmanager
    def _noting_failure(self, node: str, data: bytes, writer: Writer) -> Iterator[None]:
        try:
            yield
        except KernelError as error:
            now, by = self.timeline.now, writer.subject
            size, head, in_text = len(data), data[:_HEAD], isinstance(error, PolicyError)
            self.timeline.add(ControlFailed(now, by, node, error.errno, error.reason, size, head, in_text))
            raise
