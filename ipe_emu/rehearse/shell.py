"""The debugging shell of a boot (``--shell``, ``--shell-on-denial``): this machine's busybox within the rehearsed one.

It is no part of the rehearsal: the machine has no such program, and its policy would hardly allow it. So its own
program is not judged, the machine's other processes are stopped while it lives, and what it does is said and not
reported. Yet it is held as all of them are, by the same filter, namespaces and ids, and what it executes of the
machine's is judged: trying a program says what the policy says of it.
"""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import define, field, frozen

from ipe_emu.binfmt.dynamic import read_dynamic
from ipe_emu.binfmt.elf import BadElfError
from ipe_emu.errors import CannotEmulateError
from ipe_emu.event import File, Subject
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.rehearse.console import Console
from ipe_emu.rehearse.events import Timeline

#: As which it appears in lists of processes.
_NAME: Final = "busybox"
_HEAD: Final = 64
#: Debian's and Ubuntu's, in which it is linked statically.
PACKAGE: Final = "busybox-static"
_REMEDY: Final = f"the shell is a static busybox: sudo apt-get install {PACKAGE}"
_WHAT_IT_IS: Final = (
    "this is a shell in it, your own machine's busybox. What it executes is judged, but nothing that it does counts"
)


def static_busybox() -> Path:
    """Return this machine's busybox; CannotEmulateError if there is none that runs without libraries."""
    found = shutil.which("busybox")
    if found is None:
        raise CannotEmulateError(f"no busybox is installed; {_REMEDY}")
    with Path(found).open("rb") as file, contextlib.suppress(BadElfError):
        if not read_dynamic(file.fileno(), file.read(_HEAD)).has_interpreter:
            return Path(found)
    raise CannotEmulateError(f"{found} needs libraries that the machine may not have; {_REMEDY}")


@frozen
class Program:
    """What the shell executes: a descriptor of it, and the name and inode number that its file has in events."""

    fd: int
    path: bytes
    inode: int

    @classmethod
    def open(cls) -> "Program":
        """Copy this machine's busybox to memory, where nobody can change it.

        CannotEmulateError if there is none (`static_busybox`).
        """
        content = static_busybox().read_bytes()
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.fchmod(fd, 0o555)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return cls(fd, f"/memfd:{_NAME} (deleted)".encode(), os.fstat(fd).st_ino)


@define(eq=False)
class DebuggingShell:
    """Stops the machine for a shell, and lets it go on; from any thread.

    ``orders`` leads to the keeper. ``program`` is None where no shell is wanted: then none is opened.
    """

    program: Program | None
    timeline: Timeline
    console: Console
    orders: Callable[[], Channel]
    _first_pid: int | None = field(default=None, init=False)
    _open: bool = field(default=False, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether a shell is there, or about to be."""
        return self._open

    def open(self, why: str, leaving: str) -> bool:
        """Stop the machine where it is and start a shell in it; tell whether that was done.

        Every process is stopped before this returns: whose call is answered now does not see the answer before it is
        continued. ``why`` and ``leaving`` say to the user why it is there, and what happens when it is left.
        """
        with self._lock:
            if self.program is None or self._open:
                return False
            self.timeline.pause()
            if not self._order("stop"):
                self.timeline.resume()
                return False
            self._open = True
            self.console.say(f"ipe-emu: {why}, and is stopped there")
            self.console.say(f"ipe-emu: {_WHAT_IT_IS}. {leaving}")
            line = self.console.begin_shell()
            self.orders().send("shell", {}, [line.theirs, self.program.fd])
            return True

    def begins(self, pid: int) -> None:
        """Take note of its first process, by the number that it has in the machine, before it executes anything.

        All that have this number or a higher one come of it, for the others make none while they are stopped. Should
        the numbers begin anew, some of its deeds would count: they can only make a result worse.
        """
        self._first_pid = pid
        self.timeline.is_aside = lambda by: by is not None and by.pid >= pid

    def spares(self, subject: Subject, file: File | None) -> bool:
        """Whether it is the shell's own program that is to be executed, by the shell."""
        program = self.program
        return (
            program is not None
            and self._first_pid is not None
            and subject.pid >= self._first_pid
            and file is not None
            and (file.path, file.ino) == (program.path, program.inode)
        )

    def ended(self, *, go_on: bool) -> None:
        """The shell was left; the machine goes on if it has not come to its end.

        What was started in it and goes on as well is a part of the machine from now on.
        """
        with self._lock:
            self.console.end_shell()
            self._first_pid = None
            self._open = False
            if go_on:
                self.timeline.is_aside = lambda _: False
                self.timeline.resume()
                self._order("continue")

    def _order(self, what: str) -> bool:
        """Have the keeper do something at once; tell whether it could. It fails where the machine has just died."""
        try:
            self.orders().send(what)
            answer = self.orders().receive()
        except BrokenPipeError:
            return False
        return answer is not None and answer.kind == "done"
