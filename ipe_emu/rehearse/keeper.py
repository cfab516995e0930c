"""The keeper: first process of a pid namespace of ours, and parent of the machine's first one.

The machine's init process is not ours: it can undo what would have it die with its parent. But its pid namespace is
below the keeper's, and all processes of both are killed when the keeper ends (``zap_pid_ns_processes()``).
"""

import contextlib
import os
import select
import signal
from collections.abc import Mapping
from typing import Final, NoReturn

from ipe_emu.exec_hook import init
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux import namespaces, process
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse import command, machine
from ipe_emu.rehearse.blueprint import BootBlueprint

_SIGNALS: Final[Mapping[str, signal.Signals]] = {"stop": signal.SIGSTOP, "continue": signal.SIGCONT}


def main(channel: Channel, orders: Channel, agent: int, blueprint: BootBlueprint) -> NoReturn:
    """Be the keeper; ``agent`` is a pidfd of the parent.

    Sends ``init`` with a pidfd of the machine's first process, and ``ended`` with its status. Messages of ``orders``
    are a ``command`` or ``shell`` to be run in the machine, with descriptors of a terminal and of the shell's program;
    ``stop`` and ``continue`` are for all processes of the machine.
    """
    try:
        process.set_name(b"ipe-emu keeper")
        # The init process is in no session that it could see, and has no controlling terminal, as on a real machine.
        os.setsid()
        init.enter_user_namespace(blueprint.user_namespace)
        if select.select([agent], [], [], 0)[0]:
            os._exit(1)  # the agent died before `die_with_parent` took effect
        os.close(agent)
        namespaces.unshare(Namespace.PID)
        told, tell = os.pipe()
        first = os.fork()
        if first == 0:
            os.close(tell)
            os.read(told, 1)
            os.close(told)
            orders.close()
            machine.main(channel, blueprint)
        os.close(told)
        init_process = os.pidfd_open(first)
        channel.send("init", fds=[init_process])
        os.close(tell)
        _keep(channel, orders, init_process, blueprint)
        channel.send("ended", {"status": os.waitpid(first, 0)[1]})
    except Exception as error:
        channel.report_failure(error)
    finally:
        os._exit(0)


def _keep(channel: Channel, orders: Channel, init_process: int, blueprint: BootBlueprint) -> None:
    """Wait for the end of the machine's first process, and follow orders meanwhile.

    The end of what ``command`` and ``shell`` start is told as ``command-ended`` and ``shell-ended``, with its status;
    ``stop`` and ``continue`` are answered by ``done``, or ``gone`` if there is no machine any more.
    """
    poll = select.poll()
    for fd in (init_process, orders.fileno()):
        poll.register(fd, select.POLLIN)
    started: dict[int, tuple[int, str]] = {}
    while init_process not in (ready := {fd for fd, _ in poll.poll()}):
        for pidfd in ready & started.keys():
            poll.unregister(pidfd)
            os.close(pidfd)
            child, kind = started.pop(pidfd)
            channel.send(f"{kind}-ended", {"status": os.waitpid(child, 0)[1]})
        if orders.fileno() in ready:
            order = orders.receive()
            if order is None:
                os._exit(1)
            if order.kind in _SIGNALS:
                orders.send("done" if _signal_all(init_process, _SIGNALS[order.kind]) else "gone")
                continue
            child = os.fork()  # in the machine's pid namespace, as all children since that was made
            if child == 0 and order.kind == "shell":
                command.run_shell(channel, init_process, order.fds[0], order.fds[1], blueprint)
            if child == 0:
                command.run_command(channel, init_process, order.fds[0], order.values["text"], blueprint)
            for fd in order.fds:
                os.close(fd)
            pidfd = os.pidfd_open(child)
            started[pidfd] = child, order.kind
            poll.register(pidfd, select.POLLIN)


def _signal_all(init_process: int, number: signal.Signals) -> bool:
    """Send a signal to all processes of the machine; tell whether there were any.

    kill(-1) reaches those of the caller's pid namespace except its first one and the caller, in one step during which
    none can be made (``kill_something_info()``). That first one is stopped before, for it could make more, and
    continued last, for it waits for its children.
    """
    if number is signal.SIGSTOP:
        process.send_signal(init_process, number)
    try:
        child = os.fork()  # in the machine's pid namespace
    except OSError:  # it has ended
        return False
    if child == 0:
        with contextlib.suppress(OSError):  # there may be nobody else
            if os.getppid() == 0:  # in that namespace indeed, where this process, the parent, has no number
                os.kill(-1, number)
        os._exit(0)
    os.waitpid(child, 0)
    if number is signal.SIGCONT:
        process.send_signal(init_process, number)
    return True
