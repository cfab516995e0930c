"""What happens in a rehearsed boot, as one list of typed values: every report is made of it.

``when`` is seconds since the kernel would start the init process, ``by`` the process that did it (None where it is the
machine itself, or not known).
"""

import threading
import time
from collections.abc import Callable, Hashable

from attrs import define, evolve, field, frozen

from ipe_emu.event import File, Hook, Subject
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation, Policy


@frozen
class _Happened:
    when: float
    by: Subject | None


@frozen
class Started(_Happened):
    """The machine starts: which kernel, with what command line, and the policy that is active from the first."""

    kernel: str
    cmdline: str
    policy: Policy | None
    enforce: bool


@frozen
class ImageUnpacked(_Happened):
    """The image was unpacked, as far as the kernel does.

    ``fault`` is why it stopped, if it did, and ``exact`` whether what is there is known to be what a kernel would have
    there. ``left_out`` says in words which members a kernel drops without a word, ``differences`` what is not as on a
    kernel, and ``cut`` names the member in which the image ends.
    """

    entries: int
    size: int
    fault: str | None = None
    exact: bool = True
    left_out: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    cut: str | None = None


@frozen
class PolicyLoaded(_Happened):
    """A policy was loaded, or replaced by a newer version of itself (``updated``); ``text`` is what it was read from.

    ``active`` tells whether it was the active policy that was replaced: the newer version is in force at once.
    """

    policy: Policy
    text: bytes
    signed: bool
    updated: bool
    active: bool = False


@frozen
class PolicyActivated(_Happened):
    """A policy became the active one, in the place of ``before``."""

    policy: Policy
    before: str | None


@frozen
class PolicyDeleted(_Happened):
    """A policy was deleted."""

    name: str


@frozen
class ControlFailed(_Happened):
    """Writing to a node of the securityfs failed: ``node`` as the path below ``ipe``, and what the kernel answers.

    ``size`` is the bytes that were written at once, ``head`` the first of them; ``in_text`` says that it was the
    text of a policy that was wrong.
    """

    node: str
    errno: int
    reason: str
    size: int
    head: bytes
    in_text: bool = False


@frozen
class EnforceChanged(_Happened):
    """Enforcement was switched."""

    enforce: bool


@frozen
class Judged(_Happened):
    """IPE was asked. ``decision.errno`` is EACCES for what was denied."""

    operation: Operation
    hook: Hook
    file: File | None
    decision: Decision


@frozen
class Mounted(_Happened):
    """A file system was mounted by the emulator; ``note`` says how it differs from a kernel's."""

    kind: str
    target: str
    note: str = ""


@frozen
class SwitchedRoot(_Happened):
    """The init process executes a program of another root file system (``switch_root``)."""

    program: str


@frozen
class NotJudged(_Happened):
    """A call could not be judged, or not be emulated, and failed for that."""

    call: str
    reason: str


@frozen
class NotDone(_Happened):
    """A call that the policy allows returned success, and was not carried out."""

    call: str
    what: str


@frozen
class Message(_Happened):
    """A line of the kernel's log: its own, or one that somebody wrote to /dev/kmsg."""

    text: str


#: How a machine ends that its kernel restarts, though nobody told it to.
RESTARTED_ITSELF = "restarted by itself"


@frozen
class Rebooted(_Happened):
    """The machine was told to restart, halt or power off; ``how`` says which, ``means`` how it was told."""

    how: str
    means: str


@frozen
class Panicked(_Happened):
    """The kernel gives up, with this message."""

    message: str


@frozen
class CommandEnded(_Happened):
    """The command that was to be run in the new root ended, with its status as a shell reports it.

    None if the machine ended before it did, or before it was there.
    """

    command: str
    status: int | None


@frozen
class TimedOut(_Happened):
    """The machine was still running when its time was over, after so many seconds."""

    seconds: float


@frozen
class ShellOpened(_Happened):
    """The machine was stopped for a shell, in which a person can have changed it, and went on afterwards."""


@frozen
class Interrupted(_Happened):
    """A signal to the emulator ended the rehearsal, or a person did who typed what stands for one."""

    signal: str


@frozen
class Failed(_Happened):
    """A part of the emulator failed: nothing that it answered counts."""

    what: str


Event = (
    Started
    | ImageUnpacked
    | PolicyLoaded
    | PolicyActivated
    | PolicyDeleted
    | ControlFailed
    | EnforceChanged
    | Judged
    | Mounted
    | SwitchedRoot
    | NotJudged
    | NotDone
    | Message
    | Rebooted
    | Panicked
    | CommandEnded
    | TimedOut
    | ShellOpened
    | Interrupted
    | Failed
)


@define(eq=False)
class Timeline:
    """The events so far, in order; may be told of more from any thread.

    A machine that runs for long, or means to, does things without end. After ``most_of_all`` events only what has not
    happened before is kept; after as many of these again the rehearsal fails, for what decides it could be lost.
    """

    most_of_all: int = 20_000
    #: Tells whether what this process does is no part of the rehearsal: listeners are told of it, and it is not kept.
    is_aside: Callable[[Subject | None], bool] = field(default=lambda _: False, init=False)
    _listeners: list[Callable[[Event], None]] = field(factory=list, init=False)
    _events: list[Event] = field(factory=list, init=False)
    _start: float | None = field(default=None, init=False)
    _paused: float | None = field(default=None, init=False)
    _kinds: set[Hashable] = field(factory=set, init=False, repr=False)
    _lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened until now."""
        with self._lock:
            return tuple(self._events)

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have ``listener`` called with every event from now on, one at a time, in the thread that tells of it."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to count time: now the kernel would start the init process."""
        self._start = time.monotonic()

    @property
    def started(self) -> bool:
        """Whether the machine was started."""
        return self._start is not None

    @property
    def now(self) -> float:
        """The time that an event has which happens now."""
        if self._paused is not None:
            return self._paused
        return 0.0 if self._start is None else time.monotonic() - self._start

    def pause(self) -> None:
        """Let time stand still."""
        self._paused = self.now

    def resume(self) -> None:
        """Let it go on."""
        if self._paused is not None and self._start is not None:
            self._start = time.monotonic() - self._paused
        self._paused = None

    def add(self, event: Event) -> None:
        """Note that something happened."""
        with self._lock:
            if self.is_aside(event.by):
                for listener in self._listeners:
                    listener(event)
            elif self._is_kept(event):
                self._events.append(event)
                for listener in self._listeners:
                    listener(event)

    def _is_kept(self, event: Event) -> bool:
        kind = _kind(event)
        if len(self._events) < self.most_of_all:
            self._kinds.add(kind)
            return True
        if kind in self._kinds:
            return False
        if len(self._events) >= 2 * self.most_of_all:
            if self._kinds:
                self._kinds.clear()
                self._events.append(Failed(event.when, None, "more happened than can be remembered"))
            # There is one of each at the most.
            return isinstance(event, Rebooted | Panicked | TimedOut | Interrupted | CommandEnded)
        self._kinds.add(kind)
        return True


def _kind(event: Event) -> Hashable:
    """What makes an event another than one that happened before."""
    if isinstance(event, Judged):
        file = event.file
        place = None if file is None else (file.path, file.dev, file.facts)
        return event.operation, event.hook, place, event.decision.errno
    return evolve(event, when=0.0, by=None)
