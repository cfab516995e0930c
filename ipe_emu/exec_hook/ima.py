"""What the report of a rehearsal says of IMA's policies."""

from attrs import frozen

from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook.hook import Observer
from ipe_emu.exec_hook.plan import Event
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation


@frozen
class Reported:
    """Passes on what becomes of IMA's policies (``ima.Observer``), from the thread that serves the securityfs."""

    observer: Observer

    def denied(self, subject: Subject, file: File, decision: Decision) -> None:
        """As any other event that was denied."""
        self.observer.denied(Event(Operation.POLICY, Hook.KERNEL_READ, subject, file), decision)

    def not_judged(self, subject: Subject, call: str, reason: str) -> None:
        """As any other call that could not be judged."""
        self.observer.not_judged(subject, call, reason)

    def not_done(self, subject: Subject, call: str, what: str) -> None:
        """As any other call that returned success without being carried out."""
        self.observer.not_done(subject, call, what)
