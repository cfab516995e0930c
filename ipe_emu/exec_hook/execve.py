"""execve(2) and execveat(2): BPRM_CHECK for a program and its interpreters, MMAP for what is mapped to run."""

import contextlib
import errno
import os
import stat
from typing import Final, Protocol

from ipe_emu.binfmt.execution import Execution, Question
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.caller import Caller, entry_name
from ipe_emu.exec_hook.plan import Answer, Continue, Event, Fail, Plan, Refuse, Return
from ipe_emu.exec_hook.write_access import deny_write_access
from ipe_emu.linux.syscalls import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, signed_int
from ipe_emu.linux.tracee import Tracee
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import Profile

AT_EXECVE_CHECK: Final = 0x10000

_PATH_MAX: Final = 4096
_GOES_BY: Final = Plan(Continue())


class GoesBy(Protocol):
    """Tells of an execution whether nothing of it need be planned (``passing.Passing.goes_by``)."""

    def __call__(self, caller: Caller, directory: int, path: bytes, *, follow: bool) -> bool:
        """Tell it of what ``path`` names from a descriptor of the caller's."""


def plan_execve(caller: Caller, args: tuple[int, ...], profile: Profile, goes_by: GoesBy | None = None) -> Plan:
    """Plan execve(path, argv, envp)."""
    return _plan(caller, AT_FDCWD, args[0], 0, profile, goes_by)


def plan_execveat(caller: Caller, args: tuple[int, ...], profile: Profile, goes_by: GoesBy | None = None) -> Plan:
    """Plan execveat(directory, path, argv, envp, flags)."""
    return _plan(caller, signed_int(args[0]), args[1], signed_int(args[4]), profile, goes_by)


def _plan(caller: Caller, directory: int, address: int, flags: int, profile: Profile, goes_by: GoesBy | None) -> Plan:
    path = read_path(caller.tracee, address)
    if not path and not flags & AT_EMPTY_PATH:
        raise KernelError(errno.ENOENT, "the path is empty", "getname_flags")
    known = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | (AT_EXECVE_CHECK if profile.execve_check else 0)
    if flags & ~known:
        raise KernelError(errno.EINVAL, f"execveat(2) on {profile.name} has no such flags", "do_open_execat")
    follow = not flags & AT_SYMLINK_NOFOLLOW
    if goes_by is not None and not flags & AT_EXECVE_CHECK and goes_by(caller, directory, path, follow=follow):
        return _GOES_BY
    program = _open_execat(caller, directory, path, follow=follow)
    if flags & AT_EXECVE_CHECK:
        with contextlib.suppress(NotJudgedError):  # it need not be read for this
            _open_to_read(caller, program)
        event = Event(Operation.EXECUTE, Hook.BPRM_CREDS_FOR_EXEC, caller.subject, caller.file(program))
        return Plan(Return(0), (event,))
    return _plan_execution(caller, directory, path, program)


def read_path(tracee: Tracee, address: int) -> bytes:
    """Read a path argument as ``getname_flags()`` does: EFAULT, or ENAMETOOLONG without a NUL in 4,096 bytes."""
    try:
        path = tracee.string(address, _PATH_MAX)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise KernelError(errno.EFAULT, "the path cannot be read", "strncpy_from_user") from None
    if path is None:
        raise KernelError(errno.ENAMETOOLONG, "the path is 4,096 bytes or longer", "getname_flags")
    return path


def open_regular(caller: Caller, directory: int, path: bytes, *, follow: bool = True, searching: bool = True) -> int:
    """Return an O_PATH descriptor of a regular file that is to be executed (``may_open()``).

    Without ``searching`` it is not looked at whether the caller may search the directories on the way.
    """
    if path:
        fd = caller.look_up(directory, path, follow=follow, searching=searching)
    elif directory == AT_FDCWD:
        fd = caller.cwd()
    else:
        found = caller.descriptor(directory)
        if found is None:
            raise KernelError(errno.EBADF, f"descriptor {directory} is not open", "path_init")
        fd = found
    mode = caller.stat(fd).st_mode
    if stat.S_ISLNK(mode):
        raise KernelError(errno.ELOOP, "a symbolic link that may not be followed", "may_open")
    if not stat.S_ISREG(mode):
        raise KernelError(errno.EACCES, "no regular file", "may_open")
    return fd


def _open_execat(caller: Caller, directory: int, path: bytes, *, follow: bool = True) -> int:
    """Return an O_PATH descriptor of a file that may be executed (``do_open_execat()``)."""
    fd = open_regular(caller, directory, path, follow=follow)
    st = caller.stat(fd)
    # Asked with our own ids, which have every permission that a mode can give: no x bit at all, or a noexec mount.
    if not os.access(b"/proc/self/fd/%d" % fd, os.X_OK, effective_ids=True) or caller.access.forbids_execution(st, fd):
        raise KernelError(errno.EACCES, "not executable, or on a mount with noexec", "do_open_execat")
    return fd


def _open_to_read(caller: Caller, program: int) -> int:
    """Return a descriptor for reading of what `_open_execat` opened, unless somebody can write to it."""
    fd = caller.readable(program)
    deny_write_access(fd, certain=False)  # where it is uncertain, the kernel finds out when it carries the call out
    return fd


def _plan_execution(caller: Caller, directory: int, path: bytes, program: int) -> Plan:
    execution = Execution(Opener(caller, directory, path))
    answer: Answer
    subject = caller.subject
    try:
        loaded = execution.load(program, path)
        # An empty path was made up of a descriptor; the name is then the directory entry's (bprm->comm_from_dentry).
        subject = caller.renamed(path.rpartition(b"/")[2] if path else entry_name(loaded.fd))
        answer = Continue()
    except KernelError as error:
        answer = Fail(error)
    except NotJudgedError as error:
        answer = Refuse(str(error))
    return Plan(answer, tuple(_event(caller.subject, subject, question) for question in execution.questions))


def _event(before: Subject, after: Subject, question: Question) -> Event:
    subject = after if question.after_point_of_no_return else before
    return Event(Operation.EXECUTE, question.hook, subject, question.file, question.after_point_of_no_return)


class Opener:
    """Opens the files of one execution as its caller (``binfmt.execution.Opener``)."""

    def __init__(self, caller: Caller, directory: int, path: bytes) -> None:
        self._caller = caller
        self._directory = directory
        self._path = path
        self._formats = binfmt_misc.registered()

    def open_execat(self, path: bytes) -> int:
        """Open an interpreter as `_open_execat` does."""
        return _open_execat(self._caller, AT_FDCWD, path)

    def open_to_read(self, program: int) -> int:
        """Open it for reading, unless somebody can write to it."""
        return _open_to_read(self._caller, program)

    def file(self, program: int) -> File:
        """Return what IPE knows of it."""
        return self._caller.file(program)

    def registered_interpreter(self, head: bytes, name: bytes) -> bytes | None:
        """Return what is registered for the rehearsed tree."""
        found = binfmt_misc.match(self._formats, head, name)
        if found is None:
            return None
        if "F" in found.flags:
            raise NotJudgedError(
                f"binfmt_misc format {found.name} has an interpreter that the host opened when it was registered"
            )
        return found.interpreter

    def check_accessible(self) -> None:
        """Raise ENOENT where the interpreter would be given a path that leads nowhere."""
        # An interpreter would be given a /dev/fd path that exec closes (BINPRM_FLAGS_PATH_INACCESSIBLE).
        if self._directory == AT_FDCWD or self._path.startswith(b"/"):
            return
        if self._caller.tracee.flags_of_fd(self._directory) & os.O_CLOEXEC:
            raise KernelError(errno.ENOENT, "the interpreter could not open what is close-on-exec", "load_script")
