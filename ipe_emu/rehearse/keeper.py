"""The keeper: first process of a pid namespace of ours, and parent of the machine's first one.

The machine's init process is not ours: it can undo what would have it die with its parent. But its pid namespace is
below the keeper's, and all processes of both are killed when the keeper ends (``zap_pid_ns_processes()``).
"""

import os
import select
from typing import NoReturn

from ipe_emu.exec_hook import init
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux import namespaces, process
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse import command, machine
from ipe_emu.rehearse.blueprint import BootBlueprint


def main(channel: Channel, orders: Channel, agent: int, blueprint: BootBlueprint) -> NoReturn:
    """Be the keeper; ``agent`` is a pidfd of the parent.

    Sends ``init`` with a pidfd of the machine's first process, and ``ended`` with its status. Each message of
    ``orders`` is a command to be run in the machine (`command.main`), with a descriptor of its terminal.
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
    """Wait for the end of the machine's first process, and run the commands that are ordered meanwhile.

    The end of each command is told as ``command-ended``, with its status.
    """
    poll = select.poll()
    for fd in (init_process, orders.fileno()):
        poll.register(fd, select.POLLIN)
    commands: dict[int, int] = {}
    while init_process not in (ready := {fd for fd, _ in poll.poll()}):
        for pidfd in ready & commands.keys():
            poll.unregister(pidfd)
            os.close(pidfd)
            channel.send("command-ended", {"status": os.waitpid(commands.pop(pidfd), 0)[1]})
        if orders.fileno() in ready:
            order = orders.receive()
            if order is None:
                os._exit(1)
            child = os.fork()  # in the machine's pid namespace, as all children since that was made
            if child == 0:
                command.main(channel, init_process, order.fds[0], order.values["text"], blueprint)
            os.close(order.fds[0])
            pidfd = os.pidfd_open(child)
            commands[pidfd] = child
            poll.register(pidfd, select.POLLIN)
