"""execve(2) and execveat(2): BPRM_CHECK for a program and its interpreters, MMAP for what is mapped to run."""

import contextlib
import errno
import os
import stat
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook
from ipe_emu.exec_hook import binfmt_misc, elf, script
from ipe_emu.exec_hook.caller import Caller, entry_name
from ipe_emu.exec_hook.plan import Continue, Event, Fail, Plan, Refuse, Return
from ipe_emu.exec_hook.write_access import deny_write_access
from ipe_emu.linux.syscalls import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, signed_int
from ipe_emu.linux.tracee import Tracee
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import Profile

AT_EXECVE_CHECK: Final = 0x10000

# Enough for an ELF header and the usual number of program headers.
_HEAD_SIZE: Final = 1024
_PATH_MAX: Final = 4096
# kernel: exec_binprm(); a script may lead to a script five times
_MAX_DEPTH: Final = 5


def plan_execve(caller: Caller, args: tuple[int, ...], profile: Profile) -> Plan:
    """Plan execve(path, argv, envp)."""
    return _plan(caller, AT_FDCWD, args[0], 0, profile)


def plan_execveat(caller: Caller, args: tuple[int, ...], profile: Profile) -> Plan:
    """Plan execveat(directory, path, argv, envp, flags)."""
    return _plan(caller, signed_int(args[0]), args[1], signed_int(args[4]), profile)


def _plan(caller: Caller, directory: int, address: int, flags: int, profile: Profile) -> Plan:
    path = read_path(caller.tracee, address)
    if not path and not flags & AT_EMPTY_PATH:
        raise KernelError(errno.ENOENT, "the path is empty", "getname_flags")
    known = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | (AT_EXECVE_CHECK if profile.execve_check else 0)
    if flags & ~known:
        raise KernelError(errno.EINVAL, f"execveat(2) on {profile.name} has no such flags", "do_open_execat")
    program = _open_execat(caller, directory, path, follow=not flags & AT_SYMLINK_NOFOLLOW)
    if flags & AT_EXECVE_CHECK:
        with contextlib.suppress(NotJudgedError):  # it need not be read for this
            _open_to_read(caller, program)
        event = Event(Operation.EXECUTE, Hook.BPRM_CREDS_FOR_EXEC, caller.subject, caller.file(program))
        return Plan(Return(0), (event,))
    return _Exec(caller, directory, path).plan(program)


def read_path(tracee: Tracee, address: int) -> bytes:
    """Read a path argument as ``getname_flags()`` does: EFAULT, or ENAMETOOLONG without a NUL in 4,096 bytes."""
    try:
        path = tracee.string(address, _PATH_MAX)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise KernelError(errno.EFAULT, "the path cannot be read", "strncpy_from_user") from None
    if path is None:
        raise KernelError(errno.ENAMETOOLONG, "the path is 4,096 bytes or longer", "getname_flags")
    return path


def _open_execat(caller: Caller, directory: int, path: bytes, *, follow: bool = True) -> int:
    """Return an O_PATH descriptor of a file that may be executed (``do_open_execat()``, ``may_open()``)."""
    if path:
        fd = caller.look_up(directory, path, follow=follow)
    elif directory == AT_FDCWD:
        fd = caller.cwd()
    else:
        found = caller.descriptor(directory)
        if found is None:
            raise KernelError(errno.EBADF, f"descriptor {directory} is not open", "path_init")
        fd = found
    st = os.fstat(fd)
    if stat.S_ISLNK(st.st_mode):
        raise KernelError(errno.ELOOP, "a symbolic link that may not be followed", "may_open")
    if not stat.S_ISREG(st.st_mode):
        raise KernelError(errno.EACCES, "no regular file", "may_open")
    # Asked with our own ids, which have every permission that a mode can give: no x bit at all, or a noexec mount.
    if not os.access(b"/proc/self/fd/%d" % fd, os.X_OK, effective_ids=True) or caller.access.forbids_execution(st, fd):
        raise KernelError(errno.EACCES, "not executable, or on a mount with noexec", "do_open_execat")
    return fd


def _open_to_read(caller: Caller, program: int) -> int:
    """Return a descriptor for reading of what `_open_execat` opened, unless somebody can write to it."""
    fd = caller.readable(program)
    deny_write_access(fd, certain=False)  # where it is uncertain, the kernel finds out when it carries the call out
    return fd


class _Exec:
    """One execution, from the file that was named to the program that runs (kernel: ``struct linux_binprm``)."""

    def __init__(self, caller: Caller, directory: int, path: bytes) -> None:
        self._caller = caller
        self._directory = directory
        self._path = path
        self._events: list[Event] = []

    def plan(self, program: int) -> Plan:
        try:
            self._load_elf(*self._search_binary_handler(program))
        except KernelError as error:
            return Plan(Fail(error), tuple(self._events))
        except NotJudgedError as error:
            return Plan(Refuse(str(error)), tuple(self._events))
        return Plan(Continue(), tuple(self._events))

    def _search_binary_handler(self, program: int) -> tuple[File, int, bytes]:
        """Follow scripts to their interpreters; return the binary in the end, open for reading, and its beginning."""
        formats = binfmt_misc.registered()
        name = self._path
        for _ in range(_MAX_DEPTH + 1):
            file = self._caller.file(program)
            event = Event(Operation.EXECUTE, Hook.BPRM_CHECK, self._caller.subject, file)
            try:
                binary = _open_to_read(self._caller, program)
            except NotJudgedError:
                self._events.append(event)  # a denial makes an end before it would have to be read
                raise
            self._events.append(event)
            head = os.pread(binary, _HEAD_SIZE, 0)
            buffer = head[: script.BUFFER_SIZE].ljust(script.BUFFER_SIZE, b"\0")
            interpreter = self._interpreter(formats, buffer, name)
            if interpreter is None:
                return file, binary, head
            name = interpreter
            program = _open_execat(self._caller, AT_FDCWD, name)
        raise KernelError(errno.ELOOP, "interpreters that are scripts, nested too deeply", "exec_binprm")

    def _interpreter(self, formats: tuple[binfmt_misc.Format, ...], head: bytes, name: bytes) -> bytes | None:
        # The kernel asks binfmt_misc before binfmt_script before binfmt_elf.
        misc = binfmt_misc.match(formats, head, name)
        if misc is not None:
            if "F" in misc.flags:
                raise NotJudgedError(
                    f"binfmt_misc format {misc.name} has an interpreter that the host opened when it was registered"
                )
            interpreter = misc.interpreter
        elif script.is_script(head):
            found = script.interpreter_of(head)
            if found is None:
                raise KernelError(errno.ENOEXEC, "the first line names no interpreter", "load_script")
            interpreter = found
        else:
            return None
        if self._is_inaccessible():
            raise KernelError(errno.ENOENT, "the interpreter could not open what is close-on-exec", "load_script")
        return interpreter

    def _is_inaccessible(self) -> bool:
        """Whether an interpreter would be given a /dev/fd path that exec closes (BINPRM_FLAGS_PATH_INACCESSIBLE)."""
        if self._directory == AT_FDCWD or self._path.startswith(b"/"):
            return False
        return bool(self._caller.tracee.flags_of_fd(self._directory) & os.O_CLOEXEC)

    def _load_elf(self, file: File, binary: int, head: bytes) -> None:
        """Ask about the mappings of a program and then of its ELF interpreter (``load_elf_binary()``)."""
        kind = elf.kind_of(head)
        if kind is elf.Kind.COMPAT:
            raise NotJudgedError("a 32-bit program, whose system calls cannot be judged here")
        if kind is not elf.Kind.NATIVE:
            # Not left to this machine's kernel, which may know an interpreter for it (binfmt_misc) that we do not.
            raise KernelError(errno.ENOEXEC, "neither a script nor a program of this machine", "search_binary_handler")
        try:
            program = elf.read_program(binary, head)
        except elf.BadElfError as error:
            raise KernelError(errno.ENOEXEC, str(error), "load_elf_binary") from None
        loaded = [(file, program)]
        if program.interpreter is not None:
            interpreter = self._open_elf_interpreter(program.interpreter)
            if program.complete:  # else the process dies before
                loaded.append(interpreter)
        # An empty path was made up of a descriptor; the name is then the directory entry's (bprm->comm_from_dentry).
        comm = self._path.rpartition(b"/")[2] if self._path else entry_name(binary)
        subject = self._caller.renamed(comm)
        for mapped, segments in loaded:
            event = Event(Operation.EXECUTE, Hook.MMAP, subject, mapped, after_point_of_no_return=True)
            self._events += [event] * segments.executable_segments

    def _open_elf_interpreter(self, path: bytes) -> tuple[File, elf.Program]:
        found = _open_execat(self._caller, AT_FDCWD, path)
        fd = _open_to_read(self._caller, found)
        head = os.pread(fd, _HEAD_SIZE, 0)
        if len(head) < elf.HEADER_SIZE:
            raise KernelError(errno.EIO, "the ELF interpreter is shorter than a header", "elf_read")
        try:
            return self._caller.file(found), elf.read_interpreter(fd, head)
        except elf.BadElfError as error:
            raise KernelError(errno.ELIBBAD, f"the ELF interpreter: {error}", "load_elf_binary") from None
