"""A command that is run in the rehearsed machine beside its own processes (``--then``)."""

import os
import signal
from typing import Final, NoReturn

from ipe_emu.exec_hook.blueprint import IGNORED_SIGNALS
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux import namespaces, process, seccomp
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse.blueprint import BootBlueprint

_ENVIRONMENT: Final = {b"HOME": b"/", b"TERM": b"linux", b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin"}
#: What a shell returns for what it cannot execute.
_NOT_EXECUTABLE: Final = 126


def main(channel: Channel, init: int, console: int, text: str, blueprint: BootBlueprint) -> NoReturn:
    """Become ``sh -c text`` in the namespaces of the process ``init`` (a pidfd), at the root that these have now.

    The caller was forked into the pid namespace already. Sends ``command-listener`` with the listener of a filter of
    its own, and waits for an answer.
    """
    try:
        namespaces.enter(init, Namespace.MOUNT | Namespace.UTS | Namespace.IPC | Namespace.NET | Namespace.CGROUP)
        os.chdir("/")
        os.setsid()
        process.set_name(b"then")
        for number in (*IGNORED_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in (0, 1, 2):
            os.dup2(console, fd)
        listener = seccomp.install(blueprint.rules)
        channel.ask("command-listener", {}, [listener])
        os.close(listener)
        # The supervisor reads this process's memory to judge the call that comes now.
        process.set_dumpable(True)
        os.execve(b"/bin/sh", [b"sh", b"-c", os.fsencode(text)], _ENVIRONMENT)  # noqa: S606 - the machine's shell
    except OSError as error:
        os.write(2, f"sh: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_EXECUTABLE)
