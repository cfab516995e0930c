"""Executions that go by: whatever they map to run is sure to be allowed, and leaves no record. Nearly all are that.

Then who calls, and whether the files may be executed by him at all, need not be known. What is wrong with the call
the kernel of this machine finds itself when it carries it out, as the emulated one does.
"""

import os
import stat as status
import struct
import time
from typing import Final

from ipe_emu.binfmt.elf import Program
from ipe_emu.binfmt.execution import Execution, Loaded
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.execve import Opener, open_regular
from ipe_emu.exec_hook.plan import Passes
from ipe_emu.exec_hook.write_access import IS_DENIED_BY_KERNEL
from ipe_emu.linux import syscalls
from ipe_emu.linux.leases import is_open_for_writing
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.policy.rule import Operation


class _RecordError(Exception):
    """An event of an execution is denied, or is to be recorded."""


class Passing:
    """Finds out whether executions go by; ``passes`` is its judge's."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._programs = UnchangedPrograms()
        self._interpreters = UnchangedPrograms()

    def goes_by(self, caller: Caller, directory: int, path: bytes, *, follow: bool) -> bool:
        """Whether the execution of what ``path`` names, from a descriptor of the caller's, goes by."""
        try:
            fd = open_regular(caller, directory, path, follow=follow, searching=False)
            if not self._passes(Operation.EXECUTE, caller.facts(fd)):
                return False
            known = None if binfmt_misc.registered() else self._programs.find(caller.stat(fd))
            if known is None:
                opener = _Opener(caller, directory, path, self._passes)
                self._remember(Execution(opener).load(fd, path))
                return True
            # What is mapped of the program itself is the same question once more.
            return known.interpreter is None or (known.complete and self._interpreter_passes(caller, known.interpreter))
        except (_RecordError, KernelError, NotJudgedError):
            return False

    def _interpreter_passes(self, caller: Caller, path: bytes) -> bool:
        fd = open_regular(caller, AT_FDCWD, path, searching=False)
        if self._interpreters.find(caller.stat(fd)) is None:
            return False
        return self._passes(Operation.EXECUTE, caller.facts(fd))

    def _remember(self, loaded: Loaded) -> None:
        self._programs.add(loaded.fd, loaded.program)
        if loaded.interpreter is not None:
            self._interpreters.add(loaded.interpreter.fd, loaded.interpreter.program)


class _Opener(Opener):
    """Opens the files of an execution in haste; raises _RecordError at the first event that does not pass."""

    def __init__(self, caller: Caller, directory: int, path: bytes, passes: Passes) -> None:
        super().__init__(caller, directory, path)
        self._passes = passes

    def open_execat(self, path: bytes) -> int:
        return open_regular(self._caller, AT_FDCWD, path, searching=False)

    def open_to_read(self, program: int) -> int:
        return self._caller.readable(program) if IS_DENIED_BY_KERNEL else super().open_to_read(program)

    def file(self, program: int) -> File:
        facts = self._caller.facts(program)
        if not self._passes(Operation.EXECUTE, facts):
            raise _RecordError
        return File(b"", "", 0, facts)  # nobody is told of it


# File systems of this machine alone, on which nothing changes a file that does not set its ctime (statfs(2)). On tmpfs
# a page that was read through a mapping is writable at once, and no time tells that it was written.
_EXT4: Final = 0xEF53
_XFS: Final = 0x58465342
_BTRFS: Final = 0x9123683E
_LOCAL: Final = frozenset({_EXT4, _XFS, _BTRFS})
_STATFS_SIZE: Final = 256
_FILE_SYSTEM: Final = struct.Struct("@l")
#: How long ago a file must have changed: no clock of a file system is coarser.
_SETTLED_NS: Final = 3_000_000_000
_MOST_PROGRAMS: Final = 1024

_Identity = tuple[int, int, int, int, int]


class UnchangedPrograms:
    """What was read of programs, for as long as they are certain not to have changed.

    A program is taken in when nobody has it open for writing and its last change was long ago. Whoever changes it
    later must open it first, and the first thing he changes, through a mapping too (``file_update_time()``), gives it
    a ctime that it never had, which nobody can set back.
    """

    def __init__(self) -> None:
        self._known: dict[_Identity, Program] = {}

    def find(self, st: os.stat_result) -> Program | None:
        """Return what was read of a file with this status; None if that is not known for certain."""
        return self._known.get(_identity(st))

    def add(self, fd: int, program: Program) -> None:
        """Take in what was just read through ``fd``, if it is certain to hold for the file's present status."""
        st = os.fstat(fd)
        if (
            not status.S_ISREG(st.st_mode)
            or not st.st_ctime_ns + _SETTLED_NS < time.time_ns()
            or _file_system(fd) not in _LOCAL
            or is_open_for_writing(fd) is not False
        ):
            return
        if len(self._known) >= _MOST_PROGRAMS:
            self._known.clear()
        self._known[_identity(st)] = program


def _identity(st: os.stat_result) -> _Identity:
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns


def _file_system(fd: int) -> int:
    buffer = syscalls.writable(_STATFS_SIZE)
    syscalls.call("fstatfs", fd, buffer)
    kind: int = _FILE_SYSTEM.unpack_from(buffer)[0]
    return kind
