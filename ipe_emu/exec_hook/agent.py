"""H, the agent: a single-threaded process that makes the namespaces and mounts of a sandbox, and forks its PID 1.

It is forked by the supervisor before that has threads or has imported what starts them, which saves the 20 ms of a
fresh interpreter; setns(2) and unshare(2) of a user namespace are refused to processes with threads.
"""

import os
import signal
from typing import NoReturn

from ipe_emu.exec_hook import init, session_mounts
from ipe_emu.exec_hook.blueprint import IGNORED_SIGNALS, Blueprint
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux import namespaces, process
from ipe_emu.linux.namespaces import Namespace


def main(channel: Channel, supervisor: int, ending: int, blueprint: Blueprint) -> NoReturn:
    """Be the agent, until the sandbox has ended. A failure is reported as the message ``failed``.

    ``ending`` is for `fuse_abort.start`.
    """
    try:
        begin(supervisor)
        pid_1 = _build(channel, ending, blueprint)
        channel.close()
        process.close_from(0)
        os.waitpid(pid_1, 0)
        while blueprint.volumes:
            # The programs that serve them end with us, and whether they lived so long is to be looked at before.
            signal.pause()
    except Exception as error:
        channel.report_failure(error)
    finally:
        os._exit(0)


def begin(supervisor: int) -> None:
    """Make a process that the supervisor has forked an agent: it ends with it, and signals are not for it."""
    process.die_with_parent()
    if os.getppid() != supervisor:
        os._exit(1)  # it died before that took effect
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    process.set_name(b"ipe-emu agent")


def _build(channel: Channel, ending: int, blueprint: Blueprint) -> int:
    namespaces.unshare(Namespace.MOUNT)
    prepared = None
    if blueprint.own_securityfs:
        # Before the plan, which may cover /dev. Opened and mounted in the supervisor's user namespace
        # (``fuse_fill_super()`` wants both in the same), for who is outside the mount's may not even stat its files;
        # and from the host's pid namespace, so that requests name their callers as the supervisor knows them.
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        prepared = session_mounts.prepare(channel, fuse, ending, blueprint.volumes, blueprint.user_namespace)
    for step in blueprint.steps:
        step.execute()
    if prepared is not None:
        prepared.attach(channel)
    if not blueprint.shielded:
        # Made from here, the pid namespace belongs to the tree's root, who can then mount a /proc of it anywhere.
        init.enter_user_namespace(blueprint.user_namespace)
    namespaces.unshare(Namespace.PID)
    agent = os.pidfd_open(os.getpid())
    pid_1 = os.fork()
    if pid_1 == 0:
        init.main(channel, agent, blueprint, None if prepared is None else prepared.keys)
    return pid_1
