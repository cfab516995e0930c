"""A process that ends the FUSE connection of a supervisor that was killed, so that the supervisor can end.

Threads of the supervisor use the supervisor's own mount, and so does the agent. One that waits for an answer when the
supervisor is killed waits on: a request that was read cannot be taken back (``request_wait_answer()``), whoever would
answer it is dead, and /dev/fuse, the closing of which would end the connection, is closed when the last thread is gone.
umount2(2) with MNT_FORCE ends it (``fuse_umount_begin()``), from a process that sees the mount and waits for nobody.
"""

import contextlib
import os
import select
from pathlib import Path
from typing import Final, NoReturn

from ipe_emu.linux import mounts, process, procfs

#: How often it is looked whether the supervisor was killed, in milliseconds. A pidfd only tells of all its threads.
_INTERVAL: Final = 500


def start(ending: int, session: Path) -> None:
    """Start it in the agent, before that has a new pid namespace; it stays in the mount namespace, and with its mounts.

    ``ending`` is readable once the supervisor ends the sandbox itself: then the session is left to the supervisor.
    """
    supervisor = os.pidfd_open(os.getppid())
    if os.fork() == 0:
        _watch(ending, supervisor, session)
    os.close(supervisor)
    os.close(ending)


def _watch(ending: int, supervisor: int, session: Path) -> NoReturn:
    try:
        process.set_name(b"ipe-emu abort")
        # Neither streams of the user's nor the session itself are to be kept open.
        kept = [os.dup(ending), os.dup(supervisor)]
        for number, fd in enumerate(kept):
            os.dup2(fd, number)
        process.close_from(len(kept))
        pid = process.pid_of(1)
        poll = select.poll()
        for fd in range(len(kept)):
            poll.register(fd, select.POLLIN)
        while not poll.poll(_INTERVAL):
            if procfs.is_dying(pid):
                with contextlib.suppress(OSError):  # EBUSY: somebody uses it, but the connection is ended
                    mounts.abort(bytes(session))
                break
    finally:
        os._exit(0)
