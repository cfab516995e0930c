"""The exec hook: which system calls it wants to see, and how it answers them."""

import errno
import functools
from collections.abc import Callable
from typing import Final, Protocol

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook.caller import Caller, Machine
from ipe_emu.exec_hook.copying import plan_copy
from ipe_emu.exec_hook.execve import plan_execve, plan_execveat
from ipe_emu.exec_hook.kexec import plan_kexec_file_load, plan_kexec_load
from ipe_emu.exec_hook.mmap import PROT_EXEC, plan_mmap
from ipe_emu.exec_hook.modules import Modules
from ipe_emu.exec_hook.mount import plan_fsopen, plan_mount
from ipe_emu.exec_hook.mounts import Mounts
from ipe_emu.exec_hook.mprotect import plan_mprotect
from ipe_emu.exec_hook.plan import Continue, Event, Fail, Plan, Refuse, Return
from ipe_emu.exec_hook.remap import plan_remap_file_pages
from ipe_emu.integrity.declared import FactsSource
from ipe_emu.linux import syscalls
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
# Which arguments of these are the two descriptors.
_COPIES: Final = {"sendfile": (0, 1), "splice": (0, 2), "copy_file_range": (0, 2)}

_REFUSED: Final = {
    "shmat": "shared memory mapped with SHM_EXEC",
    "personality": "READ_IMPLIES_EXEC or MMAP_PAGE_ZERO, under which memory becomes executable unasked",
}

_Handler = Callable[[Caller, tuple[int, ...]], Plan]


class Judge(Protocol):
    """Who decides: `lsm.Ipe`, or a client of a mounted emulator."""

    @property
    def profile(self) -> Profile:
        """The kernel that is emulated."""

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        """Decide one event, and audit it."""


class Observer(Protocol):
    """Who is told, in the thread that answers, what the report of a rehearsal must say."""

    def denied(self, event: Event, decision: Decision) -> None:
        """An event was denied, and its call failed or its process died."""

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        """A call could not be judged. It failed with EPERM; ``subject`` is None if not even its caller is known."""

    def not_done(self, subject: Subject | None, call: str, what: str) -> None:
        """A call that the policy allows returned success, and was not carried out."""


def rules(*, securityfs: bool) -> tuple[Rule, ...]:
    """Return the rules of a rehearsed tree's filter; ``securityfs`` if one is emulated inside it."""
    return _ALWAYS + _WITH_SECURITYFS if securityfs else _ALWAYS


class ExecHook:
    """Answers the system calls of one rehearsed tree, in one thread.

    ``machine`` and ``pid_depth`` are those of a `Machine`; a sandbox has one pid namespace, below ours. ``securityfs``
    is the device number of the emulated securityfs, None if there is none. Raises NotJudgedError if this process has a
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
    ) -> None:
        inherited = syscalls.call("personality", _ASK_PERSONALITY)
        if inherited & (_READ_IMPLIES_EXEC | _MMAP_PAGE_ZERO):
            raise NotJudgedError(f"the personality {inherited:#x} (see setarch(8)) hides executable mappings")
        self._judge = judge
        self._facts = facts
        self._observer = observer
        self._machine = Machine(machine, pid_depth)
        self._mounts = Mounts()
        modules = Modules()
        handlers: dict[str, _Handler] = {
            "execve": functools.partial(plan_execve, profile=judge.profile),
            "execveat": functools.partial(plan_execveat, profile=judge.profile),
            "mmap": plan_mmap,
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
            for name, which in _COPIES.items():
                handlers[name] = functools.partial(plan_copy, which=which, securityfs=securityfs)
        self._handlers = {syscalls.NUMBERS[name]: handler for name, handler in handlers.items()}

    def answer(self, listener: Listener, notification: Notification) -> None:
        """Judge one call and answer it. What goes wrong in here ends as a call that was not judged."""
        try:
            plan = self._look(notification)
            # Only now is it certain that what was read was the caller's, and no successor's of the same pid.
            if listener.valid(notification):
                self._carry_out(listener, notification, plan)
        except Exception as error:  # whatever it is: the caller must neither hang nor pass
            if listener.valid(notification):
                self._refuse(listener, notification, f"{type(error).__name__}: {error}")

    def _look(self, notification: Notification) -> Plan:
        if notification.pid <= 0:
            return Plan(Refuse("the caller is in a pid namespace that cannot be seen from here"))
        handler = self._handlers.get(notification.number)
        if handler is None:
            return Plan(Refuse(_REFUSED.get(notification.name, "nothing is known here of this call")))
        try:
            with Caller(notification.pid, self._mounts, self._facts, self._machine) as caller:
                return handler(caller, notification.args)
        except KernelError as error:
            return Plan(Fail(error))
        except NotJudgedError as error:
            return Plan(Refuse(str(error)))

    def _carry_out(self, listener: Listener, notification: Notification, plan: Plan) -> None:
        for event in plan.events:
            decision = self._judge.process_event(event.operation, event.hook, event.subject, event.file)
            if decision.errno:
                self._observer.denied(event, decision)
                if event.after_point_of_no_return:
                    self._kill(listener, notification)
                else:
                    listener.fail(notification, decision.errno)
                return
        answer = plan.answer
        if isinstance(answer, Continue):
            listener.continue_(notification)
        elif isinstance(answer, Fail):
            listener.fail(notification, answer.error.errno)
        elif isinstance(answer, Return):
            if answer.instead:
                self._observer.not_done(self._subject(notification), notification.name, answer.instead)
            if answer.then is not None:
                answer.then()
            listener.reply(notification, answer.value)
        else:
            self._refuse(listener, notification, answer.reason)

    def _kill(self, listener: Listener, notification: Notification) -> None:
        """Let the execve succeed and the process die of it (``bprm_execve()``: ``force_fatal_sig(SIGSEGV)``)."""
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
