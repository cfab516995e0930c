"""The machine's console, kernel log and sysrq trigger: terminals whose other ends are ours.

All three are character devices on a real machine, and a pseudo terminal is the one that every user can make.
"""

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from attrs import define, field

#: Ends the rehearsal where a terminal is in raw mode: Control-], as in telnet(1).
ESCAPE: Final = b"\x1d"
_CHUNK: Final = 1 << 16
#: A line of the log that is longer is cut here.
_LONGEST_LINE: Final = 1024


@define(eq=False)
class Line:
    """A pseudo terminal: ``path`` is what the machine gets, ``ours`` where its other end is read and written."""

    ours: int
    theirs: int
    path: Path

    @classmethod
    def open(cls, owner: int, *, cooked: bool) -> "Line":
        """Make one that belongs to the uid ``owner``; ``cooked`` for one that treats lines as a terminal does."""
        ours, theirs = os.openpty()
        if not cooked:
            tty.setraw(theirs)
        os.fchmod(theirs, 0o600)
        if owner != os.geteuid():
            os.fchown(theirs, owner, owner)
        os.set_blocking(ours, False)
        return cls(ours, theirs, Path(os.ttyname(theirs)))

    def read(self) -> bytes:
        """Return what was written to it since, nothing if nothing was."""
        try:
            return os.read(self.ours, _CHUNK)
        except OSError:  # nothing there
            return b""

    def close(self) -> None:
        """Close both ends."""
        os.close(self.ours)
        os.close(self.theirs)


@define(eq=False)
class Console:
    """Relays the machine's console to our standard streams, in a thread; ``owner`` is the uid of the machine's root.

    To be set before it runs: ``on_log`` is told each line that is written to the kernel's log, ``on_sysrq`` each
    command that is written to the sysrq trigger, ``on_escape`` that a person wants to end the rehearsal; all in that
    thread.
    """

    owner: int
    on_log: Callable[[str], None] = field(default=lambda _: None, init=False)
    on_sysrq: Callable[[bytes], None] = field(default=lambda _: None, init=False)
    on_escape: Callable[[], None] = field(default=lambda: None, init=False)
    console: Line = field(init=False)
    kmsg: Line = field(init=False)
    sysrq: Line = field(init=False)
    interactive: bool = field(init=False)
    _shell: Line | None = field(default=None, init=False)
    _typed_to: Line = field(init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _end: tuple[int, int] = field(init=False)
    _output: threading.Lock = field(factory=threading.Lock, init=False)
    _at_line_start: bool = field(default=True, init=False)
    _log_rest: bytes = field(default=b"", init=False)

    def __attrs_post_init__(self) -> None:
        self.console = self._typed_to = Line.open(self.owner, cooked=True)
        self.kmsg = Line.open(self.owner, cooked=False)
        self.sysrq = Line.open(self.owner, cooked=False)
        self._end = os.pipe()
        self.interactive = os.isatty(0) and os.isatty(1)
        if self.interactive:
            self._copy_size()
        if not os.isatty(1):
            # A file or pipe gets lines as they were written.
            attributes = termios.tcgetattr(self.console.theirs)
            attributes[1] &= ~termios.ONLCR
            termios.tcsetattr(self.console.theirs, termios.TCSANOW, attributes)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Relay until the context ends, and then what is left."""
        before = termios.tcgetattr(0) if self.interactive else None
        if self.interactive:
            tty.setraw(0)
            signal.signal(signal.SIGWINCH, lambda *_: self._copy_size())
        # A daemon: it must not keep a supervisor alive that has to give up.
        self._thread = threading.Thread(target=self._relay, name="console", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            os.write(self._end[1], b"\n")
            self._thread.join()
            for fd, use in self._uses().items():
                while data := self._lines()[fd].read():
                    use(data)
            if before is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, before)

    def close(self) -> None:
        """Close every line."""
        for line in self._lines().values():
            line.close()
        for fd in self._end:
            os.close(fd)

    def begin_shell(self) -> Line:
        """Return a terminal of its own for a shell that is none of the machine's: what is typed goes there now."""
        if self._shell is None:
            self._shell = Line.open(self.owner, cooked=True)
            self._copy_size()
        self._typed_to = self._shell
        os.write(self._end[1], b"+")
        return self._shell

    def end_shell(self) -> None:
        """Have the machine's console back."""
        self._typed_to = self.console

    def say(self, text: str) -> None:
        """Print a line on stderr that is none of the machine's, and breaks none of its own."""
        end = "\r\n" if self.interactive else "\n"
        with self._output:
            begin = "" if self._at_line_start else end
            self._at_line_start = True
            sys.stderr.write(f"{begin}{text}{end}")
            sys.stderr.flush()

    def _relay(self) -> None:
        poll = select.poll()
        for fd in (*self._lines(), self._end[0], *((0,) if self.interactive else ())):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._end[0]:
                    if b"\n" in os.read(fd, _CHUNK):
                        return
                    for line in self._lines():  # there is one more
                        poll.register(line, select.POLLIN)
                elif fd == 0:
                    typed = os.read(0, _CHUNK)
                    if ESCAPE in typed or not typed:
                        poll.unregister(0)
                        self.on_escape()
                    with contextlib.suppress(BlockingIOError):
                        os.write(self._typed_to.ours, typed)
                elif data := self._lines()[fd].read():
                    self._uses()[fd](data)

    def _lines(self) -> dict[int, Line]:
        shell = [] if self._shell is None else [self._shell]
        return {line.ours: line for line in (self.console, self.kmsg, self.sysrq, *shell)}

    def _uses(self) -> dict[int, Callable[[bytes], None]]:
        """What is done with what is written to a line, by its descriptor."""
        others = {self.kmsg.ours: self._log, self.sysrq.ours: self._command}
        return {fd: others.get(fd, self._show) for fd in self._lines()}

    def _show(self, data: bytes) -> None:
        with self._output:
            self._at_line_start = data.endswith(b"\n")
            with contextlib.suppress(BrokenPipeError):
                while data:
                    data = data[os.write(1, data) :]

    def _log(self, data: bytes) -> None:
        *lines, self._log_rest = (self._log_rest + data).split(b"\n")
        if len(self._log_rest) > _LONGEST_LINE:
            lines.append(self._log_rest)
            self._log_rest = b""
        for line in lines:
            self.on_log(line[:_LONGEST_LINE].decode(errors="backslashreplace"))

    def _command(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            if line:
                self.on_sysrq(line)

    def _copy_size(self) -> None:
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
            for line in (self.console, self._shell):
                if line is not None:
                    fcntl.ioctl(line.theirs, termios.TIOCSWINSZ, size)
