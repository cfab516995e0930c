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
from ipe_emu.rehearse import machine
from ipe_emu.rehearse.blueprint import BootBlueprint


def main(channel: Channel, agent: int, blueprint: BootBlueprint) -> NoReturn:
    """Be the keeper; ``agent`` is a pidfd of the parent. Sends ``init`` with a pidfd, and ``ended`` with its status."""
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
            machine.main(channel, blueprint)
        os.close(told)
        channel.send("init", fds=[os.pidfd_open(first)])
        os.close(tell)
        # What it keeps open would be kept from the machine, and the supervisor's end of the channel is its own.
        status = os.waitpid(first, 0)[1]
        channel.send("ended", {"status": status})
    except OSError as error:
        channel.report_failure(error)
    finally:
        os._exit(0)
