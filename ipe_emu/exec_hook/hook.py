"""The exec hook: which system calls it wants to see, and how it answers them."""

import errno
import functools
import os
from collections.abc import Iterable
from typing import Final, Protocol

from attrs import frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook import node_calls
from ipe_emu.exec_hook.caller import Caller, Machine
from ipe_emu.exec_hook.copying import COPIES, plan_copy
from ipe_emu.exec_hook.execve import plan_execve, plan_execveat
from ipe_emu.exec_hook.kexec import plan_kexec_file_load, plan_kexec_load
from ipe_emu.exec_hook.mmap import PROT_EXEC, plan_mmap
from ipe_emu.exec_hook.modules import Modules
from ipe_emu.exec_hook.mount import plan_fsopen, plan_mount
from ipe_emu.exec_hook.mounts import Mounts
from ipe_emu.exec_hook.mprotect import plan_mprotect
from ipe_emu.exec_hook.overlay_mounts import OverlayMounts
from ipe_emu.exec_hook.overlays import Overlays
from ipe_emu.exec_hook.passing import Passing
from ipe_emu.exec_hook.plan import Answer, Continue, Event, Fail, Install, Perform, Plan, Refuse, Return
from ipe_emu.exec_hook.remap import plan_remap_file_pages
from ipe_emu.exec_hook.traps import Handler, Trap
from ipe_emu.integrity.facts import Facts
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import mountinfo, syscalls
from ipe_emu.linux.mountinfo import Superblocks
from ipe_emu.linux.ptrace import kill_at_exec
from ipe_emu.linux.seccomp import Action, AnyBit, Listener, Notification, Rule
from ipe_emu.linux.tracee import Tracee
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import Profile

_SHM_EXEC: Final = 0o100000
# Under the first, every readable mapping becomes executable without a call that says so; under the second, execve(2)
# makes an executable mapping at address 0.
_READ_IMPLIES_EXEC: Final = 0x0400000
_MMAP_PAGE_ZERO: Final = 0x0100000
_ASK_PERSONALITY: Final = 0xFFFFFFFF

_ALWAYS: Final = (
    Rule("execve", Action.NOTIFY),
    Rule("execveat", Action.NOTIFY),
    Rule("mmap", Action.NOTIFY, AnyBit(2, PROT_EXEC)),
    Rule("mprotect", Action.NOTIFY, AnyBit(2, PROT_EXEC)),
    Rule("pkey_mprotect", Action.NOTIFY, AnyBit(2, PROT_EXEC)),
    Rule("remap_file_pages", Action.NOTIFY),
    Rule("shmat", Action.NOTIFY, AnyBit(2, _SHM_EXEC)),
    Rule("personality", Action.NOTIFY, AnyBit(0, _READ_IMPLIES_EXEC | _MMAP_PAGE_ZERO, unless=_ASK_PERSONALITY)),
    Rule("finit_module", Action.NOTIFY),
    Rule("init_module", Action.NOTIFY),
    Rule("delete_module", Action.NOTIFY),
    Rule("kexec_file_load", Action.NOTIFY),
    Rule("kexec_load", Action.NOTIFY),
    Rule("mount", Action.NOTIFY),
    Rule("fsopen", Action.NOTIFY),
    Rule("uselib", Action.ENOSYS),
)
_WITH_SECURITYFS: Final = (
    Rule("sendfile", Action.NOTIFY),
    Rule("splice", Action.NOTIFY),
    Rule("copy_file_range", Action.NOTIFY),
)

_REFUSED: Final = {
    "shmat": "shared memory mapped with SHM_EXEC",
    "personality": "READ_IMPLIES_EXEC or MMAP_PAGE_ZERO, under which memory becomes executable unasked",
}


@frozen
class _Kill:
    """The execve succeeds, and the process dies of it (``bprm_execve()``: ``force_fatal_sig(SIGSEGV)``)."""


@frozen
class _Opened:
    """The call returns a new descriptor, open on what our ``fd`` is open on; ours is closed then."""

    fd: int
    close_on_exec: bool


_Outcome = Continue | Fail | Return | Refuse | _Opened | _Kill


class Judge(Protocol):
    """Who decides: `lsm.Ipe`, or a client of a mounted emulator."""

    @property
    def profile(self) -> Profile:
        """The kernel that is emulated."""

    def passes(self, operation: Operation, facts: Facts) -> bool:
        """Whether an event is sure to be allowed without a record, and is not put to ``process_event`` then."""

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        """Decide one event, and audit it; NotJudgedError if it depends on facts that are in doubt."""


class Observer(Protocol):
    """Who is told, in the thread that answers, what the report of a rehearsal must say."""

    def denied(self, event: Event, decision: Decision) -> bool:
        """An event was denied: its call fails or its process dies.

        Return True for a process that is stopped for good, and is to be kept as it is for somebody to look at.
        """

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        """A call could not be judged. It failed with EPERM; ``subject`` is None if not even its caller is known."""

    def not_done(self, subject: Subject | None, call: str, what: str) -> None:
        """A call that the policy allows returned success, and was not carried out."""


def rules(*, securityfs: bool, traps: Iterable[Trap] = (), absent: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return the rules of a rehearsed tree's filter.

    ``securityfs`` if one is emulated inside it; ``absent`` are calls that the tree's kernel shall not have.
    """
    return (
        *(Rule(name, Action.ENOSYS) for name in absent),
        # The most frequent first: the filter is gone through in this order.
        *(node_calls.RULES if securityfs else ()),
        *_ALWAYS,
        *(_WITH_SECURITYFS if securityfs else ()),
        *(trap.rule for trap in traps),
    )


class ExecHook:
    """Answers the system calls of one rehearsed tree, in one thread.

    ``machine`` and ``pid_depth`` are those of a `Machine`; a sandbox has one pid namespace, below ours. ``securityfs``
    is the device number of the emulated securityfs, None if there is none. ``traps`` are those that ``rules`` was
    given; ``modules`` are those of the machine, if somebody else wants to see them. With ``every_event`` the judge is
    also asked about what is sure to be allowed without a record. Raises NotJudgedError if this process has a
    personality that the tree would inherit and that makes memory executable unasked.
    """

    def __init__(
        self,
        judge: Judge,
        facts: FactsSource,
        observer: Observer,
        *,
        machine: int,
        pid_depth: int = 1,
        securityfs: int | None = None,
        traps: Iterable[Trap] = (),
        superblocks: Superblocks = mountinfo.OF_THIS_MACHINE,
        modules: Modules | None = None,
        every_event: bool = False,
    ) -> None:
        inherited = syscalls.call("personality", _ASK_PERSONALITY)
        if inherited & (_READ_IMPLIES_EXEC | _MMAP_PAGE_ZERO):
            raise NotJudgedError(f"the personality {inherited:#x} (see setarch(8)) hides executable mappings")
        self._judge = judge
        # An emulator of this process shares it with its securityfs.
        self._overlays = facts if isinstance(facts, Overlays) else Overlays(facts, facts, superblocks)
        self._observer = observer
        self._machine = Machine(machine, pid_depth)
        self._mounts = Mounts(superblocks)
        modules = modules or Modules()
        passes = _nothing_passes if every_event else judge.passes
        goes_by = None if every_event else Passing(passes).goes_by
        handlers: dict[str, Handler] = {
            "execve": functools.partial(plan_execve, profile=judge.profile, goes_by=goes_by),
            "execveat": functools.partial(plan_execveat, profile=judge.profile, goes_by=goes_by),
            "mmap": functools.partial(plan_mmap, passes=passes),
            "mprotect": plan_mprotect,
            "pkey_mprotect": plan_mprotect,
            "remap_file_pages": plan_remap_file_pages,
            "finit_module": modules.plan_finit_module,
            "init_module": modules.plan_init_module,
            "delete_module": modules.plan_delete_module,
            "kexec_file_load": plan_kexec_file_load,
            "kexec_load": plan_kexec_load,
            "mount": plan_mount,
            "fsopen": plan_fsopen,
        }
        if securityfs is not None:
            for copy in COPIES:
                handlers[copy.name] = functools.partial(plan_copy, copy=copy, securityfs=securityfs)
            for rule in node_calls.RULES:
                handlers[rule.syscall] = functools.partial(node_calls.PLANS[rule.syscall], securityfs=securityfs)
        of_call: dict[str, list[Handler]] = {}
        for trap in (*OverlayMounts(self._overlays).traps, *traps):
            of_call.setdefault(trap.syscall, []).append(trap.handler)
        for name, handler in handlers.items():
            of_call.setdefault(name, []).append(handler)
        self._handlers = {
            syscalls.NUMBERS[name]: tuple(asked) for name, asked in of_call.items() if name in syscalls.NUMBERS
        }

    def answer(self, listener: Listener, notification: Notification) -> None:
        """Judge one call and answer it. What goes wrong in here ends as a call that was not judged."""
        try:
            answer = self._judged(listener, notification)
            if answer is not None:
                self._send(listener, notification, answer)
        except Exception as error:  # whatever it is: the caller must neither hang nor pass
            if listener.valid(notification):
                self._refuse(listener, notification, f"{type(error).__name__}: {error}")

    def _judged(self, listener: Listener, notification: Notification) -> _Outcome | None:
        """Look at a call, have it judged, and do what we do ourselves; return what it answers, None if nobody waits."""
        if notification.pid <= 0:
            return Refuse("the caller is in a pid namespace that cannot be seen from here")
        with Caller(notification.pid, self._mounts, self._overlays, self._machine) as caller:
            plan = self._look(caller, notification)
            if not plan.events and isinstance(plan.answer, Continue) and plan.answer.then is None:
                return plan.answer  # which does nothing to a successor of the caller
            # Only now is it certain that what was read was the caller's, and no successor's of the same pid.
            if not listener.valid(notification):
                return None
            for event in plan.events:
                try:
                    decision = self._judge.process_event(event.operation, event.hook, event.subject, event.file)
                except NotJudgedError as error:
                    return Refuse(str(error))
                if decision.errno:
                    kept = self._observer.denied(event, decision)
                    return (
                        _Kill()
                        if event.after_point_of_no_return and not kept
                        else Fail(KernelError(decision.errno, "denied by IPE"))
                    )
            try:
                return _done(plan.answer)
            except KernelError as error:
                return Fail(error)
            except NotJudgedError as error:
                return Refuse(str(error))

    def _look(self, caller: Caller, notification: Notification) -> Plan:
        handlers = self._handlers.get(notification.number)
        if handlers is None:
            return Plan(Refuse(_REFUSED.get(notification.name, "nothing is known here of this call")))
        try:
            for handler in handlers:
                plan = handler(caller, notification.args)
                if plan is not None:
                    return plan
        except KernelError as error:
            return Plan(Fail(error))
        except NotJudgedError as error:
            return Plan(Refuse(str(error)))
        return Plan(Continue())

    def _send(self, listener: Listener, notification: Notification, answer: _Outcome) -> None:
        if isinstance(answer, Continue):
            if answer.then is not None:
                answer.then()
            listener.continue_(notification)
        elif isinstance(answer, Fail):
            listener.fail(notification, answer.error.errno)
        elif isinstance(answer, Return):
            if answer.instead:
                self._observer.not_done(self._subject(notification), notification.name, answer.instead)
            if answer.then is not None:
                answer.then()
            listener.reply(notification, answer.value)
        elif isinstance(answer, _Opened):
            self._install(listener, notification, answer)
        elif isinstance(answer, _Kill):
            self._kill(listener, notification)
        else:
            self._refuse(listener, notification, answer.reason)

    def _install(self, listener: Listener, notification: Notification, opened: _Opened) -> None:
        try:
            listener.install(notification, opened.fd, close_on_exec=opened.close_on_exec)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            listener.fail(notification, errno.EMFILE)
        finally:
            os.close(opened.fd)

    def _kill(self, listener: Listener, notification: Notification) -> None:
        process = Tracee(notification.pid).status.tgid
        try:
            kill_at_exec(notification.pid, process, lambda: listener.continue_(notification))
        except PermissionError:
            reason = (
                "its program was denied when it was too late to return, and under another tracer it cannot be killed"
            )
            self._refuse(listener, notification, reason)

    def _refuse(self, listener: Listener, notification: Notification, reason: str) -> None:
        self._observer.not_judged(self._subject(notification), notification.name, reason)
        listener.fail(notification, errno.EPERM)

    def _subject(self, notification: Notification) -> Subject | None:
        try:
            return self._machine.subject(Tracee(notification.pid))
        except (OSError, ValueError, IndexError):
            return None


def _nothing_passes(_operation: Operation, _facts: Facts) -> bool:
    return False


def _done(answer: Answer) -> _Outcome:
    """Do what we are to do ourselves."""
    if isinstance(answer, Perform):
        return Return(answer.act())
    if isinstance(answer, Install):
        return _Opened(answer.open_file(), answer.close_on_exec)
    return answer
