"""All that a sandbox is made from, known before its first process starts."""

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.exec_hook.mount_plan import Proc, SecurityFs, Step
from ipe_emu.exec_hook.session_mounts import PlannedVolume
from ipe_emu.linux.seccomp import Rule

#: What a terminal sends to everybody in the foreground, and what is sent to stop a program: the command decides what
#: becomes of it, and the processes of the sandbox end when the command has. Python ignores SIGPIPE and SIGXFSZ itself.
IGNORED_SIGNALS: Final = (
    signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGXFSZ,
)  # fmt: skip


@frozen
class Command:
    """What to run, and what it is to find: its environment, its working directory (None: removed), its signals."""

    arguments: Sequence[bytes]
    environment: Mapping[bytes, bytes]
    directory: Path | None
    ignored: frozenset[signal.Signals]
    blocked: frozenset[signal.Signals]

    @classmethod
    def inherited(cls, arguments: Sequence[str]) -> "Command":
        """Return the command with what this process was started with.

        Whether SIGPIPE and SIGXFSZ were ignored cannot be known, for Python ignores them in any case: they are not.
        """
        directory = None
        with contextlib.suppress(FileNotFoundError):
            directory = Path.cwd()
        inherited = {*IGNORED_SIGNALS, signal.SIGCHLD} - {signal.SIGPIPE, signal.SIGXFSZ}
        return cls(
            arguments=tuple(map(os.fsencode, arguments)),
            environment=dict(os.environb),
            directory=directory,
            ignored=frozenset(number for number in inherited if signal.getsignal(number) is signal.SIG_IGN),
            blocked=frozenset(signal.Signals(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        )


@frozen
class Blueprint:
    """The sandbox: mounts (see `mount_plan`), what to run in it, and which system calls are to be judged.

    ``own_securityfs`` is false where ``steps`` show one that is served elsewhere. ``user_namespace`` is a descriptor of
    the tree's, whose root is ``root`` outside; ``shielded`` if that is root there too (`footing.Kind`). ``volumes``
    need a securityfs of its own.
    """

    steps: Sequence[Step]
    own_securityfs: bool
    user_namespace: int
    root: int
    shielded: bool
    rules: Sequence[Rule]
    command: Command
    volumes: Sequence[PlannedVolume] = ()

    @property
    def proc(self) -> Proc:
        """The last step, which PID 1 takes: it is of the new pid namespace."""
        return Proc(read_only_controls=self.shielded)

    def describe(self) -> list[str]:
        """Return what will be done to the mount namespace, in words and in order."""
        steps: list[Step] = [*self.steps]
        if self.own_securityfs:
            steps.append(SecurityFs(-1))
        return [*(s.describe() for s in steps), *(v.describe() for v in self.volumes), self.proc.describe()]
