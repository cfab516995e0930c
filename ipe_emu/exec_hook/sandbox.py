"""The supervisor's side of a sandbox: starting it step by step, waiting for its command, passing signals on."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Final, NoReturn, Self

from attrs import define, field, frozen

from ipe_emu.errors import CannotEmulateError, IpeEmuError, NotJudgedError, UserError
from ipe_emu.exec_hook.channel import Channel, Message
from ipe_emu.linux import process
from ipe_emu.linux.process import SignalDescriptor, SignalInfo

#: Sent to the supervisor alone, they are meant for the command.
_PASSED_ON: Final = frozenset({
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP,
})  # fmt: skip
#: A stopped job continues: the command may be in another process group than the one that was continued.
_ALWAYS_PASSED_ON: Final = frozenset({signal.SIGCONT})
#: The terminal stops everybody in the foreground; the supervisor stops when it hears that the command has.
_SWALLOWED: Final = frozenset({signal.SIGTTIN, signal.SIGTTOU})
_BLOCKED: Final = _PASSED_ON | _ALWAYS_PASSED_ON | _SWALLOWED
#: Before there is a command, these end everything.
_INTERRUPTING: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})


class SignalledError(IpeEmuError):
    """A signal came before the command was started; ``status`` is what a shell would report."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.status = 128 + number


@frozen
class Surroundings:
    """What the sandbox looks like from inside.

    ``user_namespace`` is the inode number that identifies it, ``root`` the uid and gid of its root outside;
    ``securityfs_device`` the emulated securityfs's st_dev. ``keys`` is a descriptor of this machine's /proc/keys, as
    the tree's root sees it, None before ``ready`` or where there is none.
    """

    user_namespace: int
    root: int
    securityfs_device: int
    keys: int | None = None


@frozen
class Fuse:
    """The session to serve: ``descriptor`` of /dev/fuse, and ``root``, an O_PATH one of its root directory."""

    descriptor: int
    root: int


@define(eq=False)
class Sandbox:
    """A sandbox while it lives; leaving the context ends it, and everything in it.

    The calls come in this order: ``fuse`` if it has a securityfs of its own, ``volume`` for each volume that it has,
    ``surroundings``,
    ``listener``, ``wait``. Up to and with ``listener`` they raise CannotEmulateError where the
    kernel refuses something: nothing of the command has run then.

    ``be_agent`` is what the agent does, given its end of the channel, the supervisor's pid, and a descriptor for
    `fuse_abort.start`. ``root`` is the uid and
    gid of the tree's root outside; ``blocked`` are the signals that were blocked when this process was started.
    """

    _be_agent: Callable[[Channel, int, int], NoReturn]
    _root: int
    _blocked: Collection[signal.Signals]
    _channel: Channel = field(init=False)
    _agent: int = field(init=False)
    _ending: tuple[int, int] = field(init=False)
    _agent_ended: int = field(init=False)
    _signals: SignalDescriptor = field(init=False)
    _command: int | None = field(default=None, init=False)
    _for_command: list[signal.Signals] = field(factory=list, init=False)

    def __enter__(self) -> Self:
        """Fork the agent. This process must not have threads yet."""
        self._channel, theirs = Channel.pair()
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        self._signals = SignalDescriptor(_BLOCKED)
        supervisor = os.getpid()
        self._ending = os.pipe()
        self._agent = os.fork()
        if self._agent == 0:
            self._channel.close()
            os.close(self._ending[1])
            self._be_agent(theirs, supervisor, self._ending[0])
        theirs.close()
        self._agent_ended = os.pidfd_open(self._agent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill what still lives, wait until it is gone, and let signals through again."""
        self.kill()
        os.waitpid(self._agent, 0)
        self._channel.close()
        self._signals.close()
        os.close(self._agent_ended)
        for fd in self._ending:
            os.close(fd)
        if self._command is not None:
            os.close(self._command)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def kill(self) -> None:
        """Kill the agent, and with it the sandbox; from any thread."""
        os.write(self._ending[1], b"\n")
        # Through the pidfd: the number may belong to another process once this one was waited for.
        process.send_signal(self._agent_ended, signal.SIGKILL)

    def fuse(self) -> tuple[Fuse, Surroundings]:
        """Wait for the FUSE session; return what to serve, and how it looks from inside."""
        message = self.expect("fuse")
        values = message.values
        return Fuse(*message.fds), Surroundings(values["user_namespace"], self._root, values["device"])

    def volume(self) -> tuple[int, int, int | None]:
        """Wait for the next volume; return its root's st_dev and st_ino, and a pidfd of the program that serves it.

        UserError if its file system cannot be mounted.
        """
        message = self.expect("volume", "unmountable")
        if message.kind == "unmountable":
            raise UserError(f"cannot be mounted: {message.values['why']}")
        return message.values["device"], message.values["inode"], message.fds[0] if message.fds else None

    def surroundings(self) -> Surroundings:
        """Wait until everything is mounted."""
        message = self.expect("ready")
        keys = message.fds[0] if message.fds else None
        return Surroundings(message.values["user_namespace"], self._root, message.values["securityfs"], keys)

    def listener(self) -> int:
        """Have the filter installed; return the descriptor at which its notifications arrive, the only one."""
        self.tell("filter")
        return self.expect("listener").fds[0]

    def wait(self) -> int:
        """Start the command, wait for its end and return its status as a shell reports it: 128 + N for signal N.

        Passes signals on meanwhile, and stops this process when the command stops. NotJudgedError if the sandbox dies
        under the command.
        """
        self.tell("start")
        while True:
            message = self.next(self._pass_on)
            match message.kind:
                case "command":
                    self._command = message.fds[0]
                    for number in self._for_command:
                        process.send_signal(self._command, number)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "ended":
                    status = message.values["status"]
                    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                case _:
                    raise NotJudgedError(f"the sandbox failed: {message.values.get('why', message.kind)}")

    def tell(self, kind: str) -> None:
        """Send a message that has no content."""
        with contextlib.suppress(BrokenPipeError):  # what follows finds out why
            self._channel.send(kind)

    def expect(self, *kinds: str) -> Message:
        """Wait for a message of one of these kinds. CannotEmulateError if another one comes."""
        message = self.next(self.interrupt)
        if message.kind not in kinds:
            raise CannotEmulateError(f"the sandbox cannot be made: {message.values.get('why', message.kind)}")
        return message

    def next(self, on_signal: Callable[[SignalInfo], None], timeout: float | None = None) -> Message:
        """Wait for the next message, and hand to ``on_signal`` the signals that come meanwhile.

        NotJudgedError if the sandbox dies, TimeoutError if nothing happens for ``timeout`` seconds.
        """
        poll = select.poll()
        for fd in (self._channel.fileno(), self._signals.fd, self._agent_ended):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}
            if not ready:
                raise TimeoutError
            if self._signals.fd in ready:
                for received in self._signals.pending():
                    on_signal(received)
            if self._channel.fileno() in ready:
                message = self._channel.receive()
                if message is not None:
                    return message
                raise NotJudgedError("the sandbox died: something killed its first process")
            if self._agent_ended in ready:
                raise NotJudgedError("the sandbox died: something killed its agent")

    def interrupt(self, received: SignalInfo) -> None:
        """Give up at a signal that means that: SignalledError."""
        if received.signal in _INTERRUPTING:
            raise SignalledError(received.signal)

    def _pass_on(self, received: SignalInfo) -> None:
        if received.signal in _PASSED_ON and received.from_kernel:
            return  # a terminal sends it to the command as well
        if received.signal in _SWALLOWED:
            return
        if self._command is None:
            self._for_command.append(received.signal)
        else:
            process.send_signal(self._command, received.signal)
