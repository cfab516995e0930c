"""What is run in the rehearsed machine beside its own processes: a command (``--then``), a shell (``--shell``)."""

import fcntl
import os
import signal
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from ipe_emu.exec_hook.blueprint import IGNORED_SIGNALS
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux import mounts, namespaces, process, seccomp
from ipe_emu.linux.mounts import Attribute, Propagation
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse.blueprint import BootBlueprint

_ENVIRONMENT: Final = {b"HOME": b"/", b"TERM": b"linux", b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin"}
#: What a shell returns for what it cannot execute.
_NOT_EXECUTABLE: Final = 126


def run_command(channel: Channel, init: int, console: int, text: str, blueprint: BootBlueprint) -> NoReturn:
    """Become ``sh -c text`` of the machine."""

    def execute() -> None:
        os.execve(b"/bin/sh", [b"sh", b"-c", os.fsencode(text)], _ENVIRONMENT)  # noqa: S606 - the machine's shell

    _become(channel, init, console, blueprint, "then", lambda: None, execute)


def run_shell(channel: Channel, init: int, terminal: int, program: int, blueprint: BootBlueprint) -> NoReturn:
    """Become the shell that ``program`` is a descriptor of, with a controlling terminal.

    busybox executes itself for most of its commands, as /proc/self/exe. Where the machine has no /proc mounted, the
    shell gets one in a mount namespace of its own: the machine's mounts stay as they are.
    """
    lacks_proc = False

    def prepare() -> None:
        nonlocal lacks_proc
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        lacks_proc = not Path("/proc/self/exe").exists()
        if lacks_proc:
            namespaces.unshare(Namespace.MOUNT)
            mounts.set_attributes(Path("/"), Attribute.NONE, propagation=Propagation.SLAVE, recursive=True)

    def execute() -> None:
        if lacks_proc:
            try:
                Path("/proc").mkdir(exist_ok=True)
                mounts.mount(b"proc", b"/proc")
                said = "it has no /proc: this shell has one, and a mount namespace, of its own"
            except OSError as error:
                said = f"it has no /proc, and cannot get one ({error.strerror}): few commands work here"
            os.write(2, f"ipe-emu: {said}\n".encode())
        term = os.environb.get(b"TERM", _ENVIRONMENT[b"TERM"])
        environment = _ENVIRONMENT | {b"TERM": term, b"PS1": b"[ipe-emu] \\w # "}
        os.execve(program, [b"sh"], environment)  # noqa: S606 - it is the shell

    _become(channel, init, terminal, blueprint, "shell", prepare, execute)


def _become(
    channel: Channel,
    init: int,
    terminal: int,
    blueprint: BootBlueprint,
    name: str,
    prepare: Callable[[], None],
    execute: Callable[[], None],
) -> NoReturn:
    """Execute something in the namespaces of the process ``init`` (a pidfd), at the root that these have now.

    The caller was forked into the pid namespace already. After ``prepare`` it sends ``command-listener`` with the
    ``name``, the process's number in the machine, and the listener of a filter of its own; and waits for an answer.
    Calls of ``execute`` are answered as those of all others in the machine.
    """
    try:
        namespaces.enter(init, Namespace.MOUNT | Namespace.UTS | Namespace.IPC | Namespace.NET | Namespace.CGROUP)
        os.chdir("/")
        os.setsid()
        process.set_name(name.encode())
        for number in (*IGNORED_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in (0, 1, 2):
            os.dup2(terminal, fd)
        prepare()
        listener = seccomp.install(blueprint.rules)
        channel.ask("command-listener", {"name": name, "pid": os.getpid()}, [listener])
        os.close(listener)
        # The supervisor reads this process's memory to judge the call that comes now.
        process.set_dumpable(True)
        execute()
    except OSError as error:
        os.write(2, f"sh: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_EXECUTABLE)
