"""C, PID 1 of the sandbox: starts the command, reaps, and reports how the command ended.

The command and everything it starts are processes of its pid namespace: when PID 1 ends, which it does when the
command has, the kernel kills all that is left of them (``zap_pid_ns_processes()``).
"""

import contextlib
import errno
import os
import select
import signal
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from ipe_emu.exec_hook import mount_plan
from ipe_emu.exec_hook.blueprint import IGNORED_SIGNALS, Blueprint, Command
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.exec_hook.mount_plan import SECURITYFS, shown
from ipe_emu.linux import mounts, namespaces, process, procfs, seccomp
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.linux.seccomp import Rule

#: What env(1) and nohup(1) return for a command that cannot be executed, and one that is not found.
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
_DEFAULT_PATH: Final = b"/bin:/usr/bin"  # as execvp(3) where PATH is not set


def main(channel: Channel, agent: int, blueprint: Blueprint, keys: int | None) -> NoReturn:
    """Be PID 1; ``agent`` is a pidfd of the parent, ``keys`` a detached mount of what /proc/keys is to show.

    A failure before the command starts is reported as ``failed``.
    """
    try:
        process.set_name(b"ipe-emu init")
        if blueprint.shielded:
            # Before the tree's user namespace: the kernel's controls in it are to be locked read-only.
            blueprint.proc.execute()
            enter_user_namespace(blueprint.user_namespace)
        # A copy of the agent's mounts, in which they are locked, for they belong to the outer user namespace.
        namespaces.unshare(Namespace.MOUNT)
        if not blueprint.shielded:
            blueprint.proc.execute()
        process.die_with_parent()
        if select.select([agent], [], [], 0)[0]:
            os._exit(1)  # the agent died before that took effect
        os.close(agent)
        if blueprint.command.directory is not None:
            with contextlib.suppress(OSError):
                # By its path: what was mounted over the directory is to be found there.
                os.chdir(blueprint.command.directory)
        own_keys = [] if keys is None else mount_plan.cover_keys(keys)
        channel.ask("ready", _surroundings(), own_keys)
        for fd in own_keys:
            os.close(fd)
        install_filter(channel, blueprint.rules)
        _look_after(channel, blueprint.command)
    except Exception as error:
        channel.report_failure(error)
    finally:
        os._exit(0)


def install_filter(channel: Channel, rules: Sequence[Rule]) -> None:
    """Put this process, and all that come of it, under the filter; send ``listener``, and wait for the word to start.

    PID 1 is under it as well: whoever took it over would gain nothing. It needs no no_new_privs, being root of its user
    namespace, so that set-user-id programs work in the tree.
    """
    listener = seccomp.install(rules)
    channel.send("listener", fds=[listener])
    # The supervisor's must be the only copy: when it dies, waiting calls are to fail, not to wait forever.
    os.close(listener)
    if channel.receive() is None:
        os._exit(1)


def enter_user_namespace(user_namespace: int) -> None:
    """Make this process root of the tree's user namespace, beyond the reach of the tree, which is that as well."""
    namespaces.enter(user_namespace, Namespace.USER)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    process.set_dumpable(False)
    # Forgotten with the change of ids; whoever asked for it before asks again.
    process.die_with_parent()


def _surroundings() -> Mapping[str, object]:
    return {
        "user_namespace": procfs.namespace("self", "user"),
        "securityfs": mounts.mount_at(SECURITYFS).device,
    }


def _look_after(channel: Channel, command: Command) -> None:
    # What is sent to the command before it has its own dispositions is to wait for them: here they are ignored.
    signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    child = os.fork()
    if child == 0:
        _execute(command)
    channel.send("command", fds=[os.pidfd_open(child)])
    while True:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if pid != child:
            continue
        if os.WIFSTOPPED(status):
            channel.send("stopped")
        else:
            channel.send("ended", {"status": status})
            return


def _execute(command: Command) -> NoReturn:
    """Be the command. Never returns."""
    status = NOT_EXECUTABLE
    try:
        process.set_name(b"ipe-emu")
        for number in (*IGNORED_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number in command.ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, command.blocked)
        # The supervisor reads this process's memory to judge the call that comes now.
        process.set_dumpable(True)
        error = execute(command.arguments, command.environment)
        status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
        name = shown(os.fsdecode(command.arguments[0]))
        os.write(2, f"ipe-emu: {name}: {error.strerror}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(status)


def execute(arguments: Sequence[bytes], environment: Mapping[bytes, bytes]) -> OSError:
    """Execute a command as execvp(3) does; return why not.

    What the kernel does not recognise is given to /bin/sh. Of the directories of PATH, EACCES in one counts only if no
    other has the command.
    """
    name = arguments[0]
    if b"/" in name or not name:
        return _try(name, arguments, environment)
    refused: OSError | None = None
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in environment.get(b"PATH", _DEFAULT_PATH).split(b":"):
        failure = _try((directory or b".") + b"/" + name, arguments, environment)
        if failure.errno == errno.EACCES:
            refused = refused or failure
        elif failure.errno not in (errno.ENOENT, errno.ENOTDIR):
            return failure
    return refused or error


def _try(path: bytes, arguments: Sequence[bytes], environment: Mapping[bytes, bytes]) -> OSError:
    try:
        try:
            os.execve(path, [*arguments], environment)  # noqa: S606 - no shell is the point
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            os.execve(b"/bin/sh", [b"sh", path, *arguments[1:]], environment)  # noqa: S606 - as execvp(3)
    except OSError as error:
        return error
