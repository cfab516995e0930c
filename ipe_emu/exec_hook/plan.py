"""What a system call means to IPE, as a value: the events it raises, in order, and what happens if all are allowed.

Handlers only look and return such a plan; `hook.ExecHook` has it judged and answers the call.
"""

from collections.abc import Callable

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Facts
from ipe_emu.policy.rule import Operation

#: Tells whether an event of a file with these facts is sure to be allowed without a record (``hook.Judge.passes``).
#: What is wrong with its call otherwise, the kernel of this machine finds itself, as the emulated one does.
Passes = Callable[[Operation, Facts], bool]


@frozen
class Event:
    """One question to the LSM. A denial fails the call with EACCES.

    After the point of no return (``bprm->point_of_no_return``) there is nothing left that the call could return to:
    a denial then kills the process with SIGSEGV.
    """

    operation: Operation
    hook: Hook
    subject: Subject
    file: File | None
    after_point_of_no_return: bool = False


@frozen
class Continue:
    """The kernel of this machine carries the call out, and finds its own errors.

    ``then`` is called just before.
    """

    then: Callable[[], object] | None = None


@frozen
class Fail:
    """The call fails as the emulated kernel would have it fail."""

    error: KernelError


@frozen
class Return:
    """The call returns ``value`` without being carried out; ``instead`` says what a kernel would have done.

    ``then`` is called when it does: what changes by the call, as far as later ones are to see it.
    """

    value: int
    instead: str = ""
    then: Callable[[], None] | None = None


@frozen
class Perform:
    """We carry the call out: it returns what ``act`` does.

    ``act`` is called once the events are allowed and the call is known to be the caller's, whose descriptors are open
    still. It may raise KernelError (the call fails with that), and NotJudgedError or OSError (it is refused).
    """

    act: Callable[[], int]


@frozen
class Install:
    """The call returns a new descriptor, open on what ``open_file`` opens for it: a descriptor that is closed then.

    When it is called, and what it may raise, is as with `Perform`.
    """

    open_file: Callable[[], int]
    close_on_exec: bool


@frozen
class Refuse:
    """The call cannot be judged, or not be done here: it fails with EPERM, and the rehearsal fails with it."""

    reason: str


Answer = Continue | Fail | Return | Perform | Install | Refuse


@frozen
class Plan:
    """The events of one call, in the kernel's order, and its answer if none of them is denied."""

    answer: Answer
    events: tuple[Event, ...] = ()
