"""What becomes of each file of a tree under a policy: would it run, by which rule, and what would it die of."""

import enum
import errno
import functools
import lzma
import os
import stat
import zlib
from types import TracebackType
from typing import Final, Self

from attrs import frozen

from ipe_emu.binfmt import elf, script
from ipe_emu.binfmt.dynamic import Dynamic, read_dynamic
from ipe_emu.binfmt.execution import Execution, Loaded, Question
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.policy.evaluate import Verdict, evaluate
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.rule import Action, Operation
from ipe_emu.simulate.known import Known
from ipe_emu.simulate.ld_so import Libraries, Library, NotFoundHereError, Program, UnusableError
from ipe_emu.simulate.tree import Found, Tree, Unreadable, reopen

_HEAD_SIZE: Final = 1024
_EXECUTABLE: Final = 0o111
_GAINS_PRIVILEGES: Final = stat.S_ISUID | stat.S_ISGID
_CAPABILITIES: Final = "security.capability"
_MAGIC: Final = b"\x7fELF"
_COMPRESSED: Final = {b".gz": b"\x1f\x8b", b".xz": b"\xfd7zXZ\0", b".zst": b"\x28\xb5\x2f\xfd"}
# No module has a table of names as long as this.
_MAX_MODULE_READ: Final = 16 << 20
_XZ_MEMORY: Final = 64 << 20
_COMPRESSED_HEAD: Final = 64 << 10
_LINKED_KEPT: Final = 128


class Kind(enum.Enum):
    """What a file is to whoever uses it; a file that is neither of the others is OTHER."""

    PROGRAM = "program"
    SCRIPT = "script"
    LIBRARY = "library"
    MODULE = "module"
    OTHER = "other"


class Outcome(enum.Enum):
    """What becomes of a file."""

    RUNS = "runs"
    DENIED = "denied"
    INTERPRETER_DENIED = "interpreter denied"
    INTERPRETER_MISSING = "interpreter missing"
    KILLED = "killed"
    LIBRARY_DENIED = "library denied"
    LIBRARY_MISSING = "library missing"
    FAILS = "fails"
    NO_PROGRAM = "no program"
    NOT_JUDGED = "not judged"

    @property
    def is_failure(self) -> bool:
        """Whether something that was meant to run would not."""
        return self not in {Outcome.RUNS, Outcome.NO_PROGRAM, Outcome.NOT_JUDGED}


@frozen
class Asked:
    """One question and its answer; ``path`` is the file's, None for memory without one."""

    hook: Hook
    path: bytes | None
    verdict: Verdict


@frozen
class Judgement:
    """What becomes of a file. The last of ``asked`` is the denial, if one decided.

    ``answer`` is what whoever uses it sees: an errno's symbol, ``SIGSEGV``, or ``127`` for the dynamic linker's exit.
    """

    path: bytes
    kind: Kind
    outcome: Outcome
    answer: str = ""
    reason: str = ""
    asked: tuple[Asked, ...] = ()
    facts: Facts = NO_FACTS

    @property
    def decisive(self) -> Verdict | None:
        """The denial, or what let a file itself run; None if the policy did not decide."""
        if self.asked and self.asked[-1].verdict.action is Action.DENY:
            return self.asked[-1].verdict
        return self.asked[0].verdict if self.asked and self.outcome is Outcome.RUNS else None


@frozen
class _End:
    """How something ends that got so far."""

    outcome: Outcome
    answer: str = ""
    reason: str = ""
    asked: tuple[Asked, ...] = ()


_RUNS: Final = _End(Outcome.RUNS)


class Judge:
    """Judges the files of one tree by one policy.

    ``module_decompress`` is whether the kernel unpacks compressed modules itself (CONFIG_MODULE_DECOMPRESS); None where
    that is not known.
    """

    def __init__(self, index: RuleIndex, known: Known, *, module_decompress: bool | None = None) -> None:
        self.tree: Tree = known.tree
        self._index = index
        self._known = known
        self._module_decompress = module_decompress
        self._libraries = Libraries(self.tree, self.file_of)
        self._linked = functools.lru_cache(_LINKED_KEPT)(self._link)

    def judge(self, found: Found | Unreadable) -> Judgement | None:
        """Judge what `Tree.walk` gives. None for a file that no question of these is about."""
        if isinstance(found, Unreadable):
            return self._unreadable(found)
        try:
            head = os.pread(found.fd, _HEAD_SIZE, 0)
            return self._judge(found, head)
        except NotJudgedError as error:
            return Judgement(found.path, Kind.OTHER, Outcome.NOT_JUDGED, reason=str(error))
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
            return Judgement(found.path, Kind.OTHER, Outcome.NOT_JUDGED, reason=reason)

    def _unreadable(self, found: Unreadable) -> Judgement | None:
        name = found.path.rpartition(b"/")[2]
        if found.st is not None and not found.st.st_mode & _EXECUTABLE and b".so" not in name and b".ko" not in name:
            return None
        what = "it cannot be read" if found.st is not None else "the directory cannot be read"
        return Judgement(found.path, Kind.OTHER, Outcome.NOT_JUDGED, reason=f"{what}: {found.reason}")

    def _judge(self, found: Found, head: bytes) -> Judgement | None:
        executable = bool(found.st.st_mode & _EXECUTABLE)
        kind = elf.kind_of(head)
        if kind is elf.Kind.NATIVE:
            try:
                dynamic = read_dynamic(found.fd, head)
            except elf.BadElfError as error:
                if not executable:
                    reason = f"no sound ELF file: {error}"
                    return Judgement(found.path, Kind.LIBRARY, Outcome.NOT_JUDGED, reason=reason)
            else:
                if _is_library(dynamic, executable=executable):
                    return self._library(found, head)
        elif kind is elf.Kind.COMPAT and not executable:
            return self._foreign_library(found)
        elif kind is elf.Kind.NOT_ELF and (module := self._module(found, head)) is not None:
            return module
        return self._program(found, head) if executable else None

    # -- what holds for a file ----------------------------------------------------------------------------------

    def file_of(self, fd: int) -> File:
        """Return what IPE knows of a file of the tree, by any descriptor of it."""
        return self._file(self.tree.path_of(fd), fd, os.fstat(fd))

    def _file(self, path: bytes, fd: int, st: os.stat_result) -> File:
        try:
            facts = self._known.facts_of(path, fd, st)
        except OSError as error:  # a kernel's answers to the digest are none to what is judged here
            raise NotJudgedError(f"{os.fsdecode(path)} cannot be measured: {error.strerror}") from None
        return File(path, "", st.st_ino, facts)

    def _ask(self, operation: Operation, hook: Hook, file: File | None) -> Asked:
        verdict = evaluate(self._index, operation, NO_FACTS if file is None else file.facts)
        return Asked(hook, None if file is None else file.path, verdict)

    # -- programs and scripts -----------------------------------------------------------------------------------

    def _program(self, found: Found, head: bytes) -> Judgement:
        kind = Kind.SCRIPT if script.is_script(head) else Kind.PROGRAM if head.startswith(_MAGIC) else Kind.OTHER
        with _Opener(self, found) as opener:
            file = opener.file(found.fd)
            execution = Execution(opener)
            try:
                end = self._run(execution.load(found.fd, found.path))
            except NotJudgedError as error:
                end = _End(Outcome.NOT_JUDGED, reason=str(error))
            except KernelError as error:
                end = self._failed(error, head, opener)
            asked = []
            for number, question in enumerate(execution.questions):
                asked.append(self._ask(Operation.EXECUTE, question.hook, question.file))
                if asked[-1].verdict.action is Action.DENY:
                    end = _denied(number, question)
                    break
        return Judgement(found.path, kind, end.outcome, end.answer, end.reason, (*asked, *end.asked), file.facts)

    def _failed(self, error: KernelError, head: bytes, opener: "_Opener") -> _End:
        if error.errno == errno.ENOEXEC:
            if opener.is_foreign or elf.is_of_another_machine(head):
                return _End(Outcome.NOT_JUDGED, reason="a program of another machine than this one")
            if not head.startswith(_MAGIC) and not script.is_script(head):
                return _End(Outcome.NO_PROGRAM, error.name, error.reason)
        if opener.missing is not None:
            reason = f"its interpreter {opener.missing} is not in the tree"
            return _End(Outcome.INTERPRETER_MISSING, error.name, reason)
        return _End(Outcome.FAILS, error.name, error.reason)

    def _run(self, loaded: Loaded) -> _End:
        """Go on where the kernel has mapped a program; the questions so far are looked at elsewhere."""
        if not loaded.program.complete or (loaded.interpreter is not None and not loaded.interpreter.program.complete):
            return _End(Outcome.KILLED, "SIGSEGV", "the kernel cannot map all of its segments")
        if loaded.interpreter is None:
            return _RUNS
        st = os.fstat(loaded.fd)
        assert loaded.program.interpreter is not None  # noqa: S101 - one was opened
        secure = bool(st.st_mode & _GAINS_PRIVILEGES) or _has_capabilities(loaded.fd)
        linker = loaded.interpreter.file.path
        return self._linked(loaded.file.path, loaded.program.interpreter, linker, secure, st.st_nlink > 1)

    def _link(self, path: bytes, interpreter: bytes, linker: bytes, secure: bool, several_names: bool) -> _End:
        """Follow the dynamic linker of the program at ``path``: the same for every script that leads to it."""
        try:
            dynamic = self._dynamic_of(path)
        except NotJudgedError as error:
            return _End(Outcome.NOT_JUDGED, reason=str(error))
        asked: list[Asked] = []
        try:
            named = Program(path, dynamic, secure=secure, several_names=several_names)
            for library in self._libraries.of_program(named, interpreter, linker):
                if (end := self._map(library, dynamic, asked)) is not None:
                    return end
        except NotFoundHereError as error:
            hint = f" ({error.hint})" if error.hint else ""
            reason = f"{_by(error.needed_by, path)} needs {os.fsdecode(error.name)}, which is not in the tree{hint}"
            return _End(Outcome.LIBRARY_MISSING, "127", reason, tuple(asked))
        except UnusableError as error:
            reason = f"{_by(error.needed_by, path)} needs {os.fsdecode(error.found.path)}: {error.found.reason}"
            return _End(Outcome.LIBRARY_MISSING, "127", reason, tuple(asked))
        except NotJudgedError as error:
            return _End(Outcome.NOT_JUDGED, reason=str(error), asked=tuple(asked))
        return _End(Outcome.RUNS, asked=tuple(asked))

    def _map(self, library: Library, program: Dynamic, asked: list[Asked]) -> _End | None:
        if library.executable_segments:
            asked.append(self._ask(Operation.EXECUTE, Hook.MMAP, library.file))
            if asked[-1].verdict.action is Action.DENY:
                reason = f"its library {os.fsdecode(library.path)} is denied: failed to map segment"
                return _End(Outcome.LIBRARY_DENIED, "127", reason, tuple(asked))
        if library.dynamic.stack is not False and program.stack is False:
            # _dl_make_stack_executable(): mprotect(2) of memory that no file is behind
            asked.append(self._ask(Operation.EXECUTE, Hook.MPROTECT, None))
            if asked[-1].verdict.action is Action.DENY:
                reason = f"{os.fsdecode(library.path)} wants an executable stack: anonymous memory, which is denied"
                return _End(Outcome.LIBRARY_DENIED, "127", reason, tuple(asked))
        return None

    def _dynamic_of(self, path: bytes) -> Dynamic:
        try:
            found = self.tree.look_up(path)
            try:
                fd = reopen(found)
            finally:
                os.close(found)
            try:
                return read_dynamic(fd, os.pread(fd, _HEAD_SIZE, 0))
            finally:
                os.close(fd)
        except (elf.BadElfError, OSError) as error:
            raise NotJudgedError(f"what {os.fsdecode(path)} needs cannot be read: {error}") from None

    # -- libraries ----------------------------------------------------------------------------------------------

    def _library(self, found: Found, head: bytes) -> Judgement:
        file = self._file(found.path, found.fd, found.st)
        try:
            segments = elf.read_interpreter(found.fd, head)
        except elf.BadElfError as error:
            reason = f"no sound ELF file: {error}"
            return Judgement(found.path, Kind.LIBRARY, Outcome.NOT_JUDGED, reason=reason, facts=file.facts)
        if not segments.executable_segments and not found.st.st_mode & _EXECUTABLE:
            reason = "it has no executable segment, so nobody is asked"
            return Judgement(found.path, Kind.LIBRARY, Outcome.RUNS, reason=reason, facts=file.facts)
        asked = self._ask(Operation.EXECUTE, Hook.MMAP, file)
        end = _RUNS if asked.verdict.action is Action.ALLOW else _End(Outcome.DENIED, "EACCES")
        return Judgement(found.path, Kind.LIBRARY, end.outcome, end.answer, end.reason, (asked,), file.facts)

    def _foreign_library(self, found: Found) -> Judgement:
        file = self._file(found.path, found.fd, found.st)
        asked = self._ask(Operation.EXECUTE, Hook.MMAP, file)
        end = _End(Outcome.NOT_JUDGED, reason="a library of 32-bit programs, whose system calls cannot be judged here")
        if asked.verdict.action is Action.DENY:
            end = _End(Outcome.DENIED, "EACCES")
        return Judgement(found.path, Kind.LIBRARY, end.outcome, end.answer, end.reason, (asked,), file.facts)

    # -- kernel modules -----------------------------------------------------------------------------------------

    def _module(self, found: Found, head: bytes) -> Judgement | None:
        suffix = next((s for s in _COMPRESSED if found.path.endswith(b".ko" + s)), None)
        if suffix is not None and head.startswith(_COMPRESSED[suffix]):
            return self._compressed_module(found, suffix)
        if not head.startswith(_MAGIC):
            return None
        if elf.is_of_another_machine(head):
            if not found.path.endswith(b".ko"):
                return None
            return Judgement(found.path, Kind.MODULE, Outcome.NOT_JUDGED, reason="a module of another machine")

        def read(offset: int, length: int) -> bytes:
            if length > _MAX_MODULE_READ:
                raise NotJudgedError(f"an ELF file with {length} bytes of headers or names")
            return os.pread(found.fd, length, offset)

        if elf.module_name(read, found.st.st_size) is None:
            return None
        file = self._file(found.path, found.fd, found.st)
        return _of_module(found, file, self._ask(Operation.KMODULE, Hook.KERNEL_READ, file))

    def _compressed_module(self, found: Found, suffix: bytes) -> Judgement | None:
        """Judge a module that either the kernel unpacks, reading the file, or kmod in memory: then there is no file."""
        begin = _unpacked_head(os.pread(found.fd, _COMPRESSED_HEAD, 0), suffix)
        if begin is not None and not begin.startswith(_MAGIC):
            return None
        file = self._file(found.path, found.fd, found.st)
        read = self._ask(Operation.KMODULE, Hook.KERNEL_READ, file)
        load = self._ask(Operation.KMODULE, Hook.KERNEL_LOAD, None)
        asked = read if self._module_decompress else load
        if self._module_decompress is None and read.verdict.action is not load.verdict.action:
            reason = (
                "it is compressed: a kernel that unpacks it itself (CONFIG_MODULE_DECOMPRESS) reads the file, and says"
                f" {read.verdict.action.value}; for others kmod unpacks it in memory, and they say"
                f" {load.verdict.action.value}"
            )
            return Judgement(
                found.path, Kind.MODULE, Outcome.NOT_JUDGED, reason=reason, asked=(read, load), facts=file.facts
            )
        if begin is None and asked.verdict.action is Action.ALLOW:
            reason = "compressed in a way that cannot be unpacked here to see whether it is a module"
            return Judgement(
                found.path, Kind.MODULE, Outcome.NOT_JUDGED, reason=reason, asked=(asked,), facts=file.facts
            )
        return _of_module(found, file, asked)


class _Opener:
    """Opens the files of one execution in the tree (``binfmt.execution.Opener``)."""

    def __init__(self, judge: Judge, found: Found) -> None:
        self._judge = judge
        self._found = found
        self._opened: list[int] = []
        self.missing: str | None = None
        self.is_foreign = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for fd in self._opened:
            os.close(fd)

    def open_execat(self, path: bytes) -> int:
        if not path:  # the kernel opens the working directory
            raise KernelError(errno.EACCES, "no regular file", "may_open")
        try:
            fd = self._judge.tree.look_up(path)
        except OSError as error:
            if isinstance(error, KernelError) or error.errno is None:
                raise
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                self.missing = os.fsdecode(path)
            raise KernelError(error.errno, f"its interpreter {os.fsdecode(path)}", "do_open_execat") from None
        self._opened.append(fd)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) or not mode & _EXECUTABLE:
            reason = f"its interpreter {os.fsdecode(path)} is not executable, or no regular file"
            raise KernelError(errno.EACCES, reason, "do_open_execat")
        return fd

    def open_to_read(self, program: int) -> int:
        if program == self._found.fd:
            return program
        fd = reopen(program)
        self._opened.append(fd)
        self.is_foreign = elf.is_of_another_machine(os.pread(fd, elf.HEADER_SIZE, 0))
        return fd

    def file(self, program: int) -> File:
        if program == self._found.fd:
            return self._judge._file(self._found.path, program, self._found.st)
        return self._judge.file_of(program)

    def registered_interpreter(self, head: bytes, name: bytes) -> bytes | None:  # noqa: ARG002 - the protocol's
        return None  # as in the sandbox of `run`, nothing is registered

    def check_accessible(self) -> None:
        """Every file is executed by its path."""


def _is_library(dynamic: Dynamic, *, executable: bool) -> bool:
    """Whether a file is for being mapped by others. A static-pie program looks much alike, and needs nothing."""
    if not dynamic.is_dynamic or dynamic.is_program:
        return False
    if dynamic.soname is not None:
        return True
    return not dynamic.has_interpreter and (bool(dynamic.needed) or not executable)


def _denied(number: int, question: Question) -> _End:
    path = os.fsdecode(question.file.path)
    if question.after_point_of_no_return:
        return _End(Outcome.KILLED, "SIGSEGV", f"mapping {path} to run is denied")
    if number:
        return _End(Outcome.INTERPRETER_DENIED, "EACCES", f"its interpreter {path} is denied")
    return _End(Outcome.DENIED, "EACCES")


def _of_module(found: Found, file: File, asked: Asked) -> Judgement:
    end = _RUNS if asked.verdict.action is Action.ALLOW else _End(Outcome.DENIED, "EACCES")
    return Judgement(found.path, Kind.MODULE, end.outcome, end.answer, end.reason, (asked,), file.facts)


def _by(needed_by: bytes, program: bytes) -> str:
    return "it" if needed_by == program else f"its library {os.fsdecode(needed_by)}"


def _has_capabilities(fd: int) -> bool:
    try:
        return bool(os.getxattr(fd, _CAPABILITIES))
    except OSError:
        return False


def _unpacked_head(data: bytes, suffix: bytes) -> bytes | None:
    """Return how a compressed file begins; nothing for a damaged one, None where we cannot tell."""
    try:
        if suffix == b".gz":
            return zlib.decompressobj(wbits=31).decompress(data, elf.HEADER_SIZE)
        if suffix == b".xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY).decompress(data, elf.HEADER_SIZE)
    except zlib.error:
        return b""
    except (lzma.LZMAError, MemoryError):
        return None
    return None
