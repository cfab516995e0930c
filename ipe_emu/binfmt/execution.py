"""What an execution asks IPE, in order, whoever opens the files (fs/exec.c, fs/binfmt_script.c, fs/binfmt_elf.c)."""

import errno
from typing import Final, Protocol

from attrs import define, field, frozen

from ipe_emu.binfmt import elf, script
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook

# Enough for an ELF header and the usual number of program headers.
_HEAD_SIZE: Final = 1024
# kernel: exec_binprm(); a script may lead to a script five times
_MAX_DEPTH: Final = 5


class Opener(Protocol):
    """Opens the files of one execution, as whoever executes them. The descriptors stay its own."""

    def open_execat(self, path: bytes) -> int:
        """Return an O_PATH descriptor of a file that may be executed. KernelError as ``do_open_execat()``."""

    def open_to_read(self, program: int) -> int:
        """Return a descriptor for reading of what `open_execat` opened. NotJudgedError where we may not read it."""

    def file(self, program: int) -> File:
        """Return what IPE knows of what `open_execat` opened."""

    def registered_interpreter(self, head: bytes, name: bytes) -> bytes | None:
        """Return the interpreter that binfmt_misc has for a file that begins with ``head`` and is executed by a name.

        NotJudgedError where that cannot be known.
        """

    def check_accessible(self) -> None:
        """Raise KernelError if an interpreter could not open what is executed."""


@frozen
class Question:
    """One question about op=EXECUTE; after the point of no return a denial ends the process with SIGSEGV."""

    hook: Hook
    file: File
    after_point_of_no_return: bool = False


@frozen
class Loaded:
    """What runs in the end: the program, ``fd`` open for reading, and its ELF interpreter, if it has one."""

    file: File
    fd: int
    program: elf.Program
    interpreter: "Loaded | None" = None


@define
class Execution:
    """One execution, from the file that was named to the program that runs (kernel: ``struct linux_binprm``).

    ``questions`` are those that come before whatever `load` returns or raises: the first that is denied decides.
    """

    opener: Opener
    questions: list[Question] = field(factory=list, init=False)

    def load(self, program: int, name: bytes) -> Loaded:
        """Follow what `Opener.open_execat` opened under ``name`` to the program that runs.

        Raises KernelError as execve(2), and NotJudgedError.
        """
        return self._load_elf(*self._search_binary_handler(program, name))

    def _search_binary_handler(self, program: int, name: bytes) -> tuple[File, int, bytes]:
        """Follow scripts to their interpreters; return the binary in the end, open for reading, and its beginning."""
        for _ in range(_MAX_DEPTH + 1):
            file = self.opener.file(program)
            question = Question(Hook.BPRM_CHECK, file)
            try:
                binary = self.opener.open_to_read(program)
            except NotJudgedError:
                self.questions.append(question)  # a denial makes an end before it would have to be read
                raise
            head = elf.kernel_read(binary, _HEAD_SIZE, 0)  # before the question (prepare_binprm())
            self.questions.append(question)
            buffer = head[: script.BUFFER_SIZE].ljust(script.BUFFER_SIZE, b"\0")
            interpreter = self._interpreter(buffer, name)
            if interpreter is None:
                return file, binary, head
            name = interpreter
            program = self.opener.open_execat(name)
        raise KernelError(errno.ELOOP, "interpreters that are scripts, nested too deeply", "exec_binprm")

    def _interpreter(self, head: bytes, name: bytes) -> bytes | None:
        # The kernel asks binfmt_misc before binfmt_script before binfmt_elf.
        interpreter = self.opener.registered_interpreter(head, name)
        if interpreter is None:
            if not script.is_script(head):
                return None
            interpreter = script.interpreter_of(head)
            if interpreter is None:
                raise KernelError(errno.ENOEXEC, "the first line names no interpreter", "load_script")
        self.opener.check_accessible()
        return interpreter

    def _load_elf(self, file: File, binary: int, head: bytes) -> Loaded:
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
        interpreter = None if program.interpreter is None else self._open_elf_interpreter(program.interpreter)
        self._map(file, program)
        if interpreter is not None and program.complete:  # else the process dies before
            self._map(interpreter.file, interpreter.program)
        return Loaded(file, binary, program, interpreter)

    def _map(self, file: File, program: elf.Program) -> None:
        question = Question(Hook.MMAP, file, after_point_of_no_return=True)
        self.questions += [question] * program.executable_segments

    def _open_elf_interpreter(self, path: bytes) -> Loaded:
        found = self.opener.open_execat(path)
        fd = self.opener.open_to_read(found)
        head = elf.kernel_read(fd, _HEAD_SIZE, 0)
        if len(head) < elf.HEADER_SIZE:
            raise KernelError(errno.EIO, "the ELF interpreter is shorter than a header", "elf_read")
        try:
            return Loaded(self.opener.file(found), fd, elf.read_interpreter(fd, head))
        except elf.BadElfError as error:
            raise KernelError(errno.ELIBBAD, f"the ELF interpreter: {error}", "load_elf_binary") from None
