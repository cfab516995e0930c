"""Asking the kernel whether anybody has a file open for writing, by a lease (fcntl(2))."""

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from typing import Final

from ipe_emu.linux import process, syscalls

_SET_SIGNAL: Final = 10


def is_open_for_writing(fd: int, *, as_owner: bool = False) -> bool | None:
    """Whether the file that ``fd`` was opened to read is open for writing, through whatever mount and by anybody.

    It is so by the count that ``deny_write_access()`` goes by, which leaves out a descriptor of memfd_create(2). None
    where the kernel does not say: it gives leases to who owns the file or has CAP_LEASE, and not on every file system.
    ``as_owner`` tries more: root of a user namespace can be another for a moment, though this process's own files in
    /proc are closed to it meanwhile.
    """
    # Whoever opens the file for writing while the lease is held waits for its end; its holder is sent a signal, which
    # must not be the usual SIGIO, that would kill us.
    fcntl.fcntl(fd, _SET_SIGNAL, signal.SIGURG)
    busy = _ask(fd)
    if busy is None and as_owner:
        with _filesystem_user(os.fstat(fd).st_uid):
            busy = _ask(fd)
    return busy


def _ask(fd: int) -> bool | None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


@contextlib.contextmanager
def _filesystem_user(uid: int) -> Iterator[None]:
    """Give this thread, and it alone, another file system user id (setfsuid(2))."""
    dumpable = process.is_dumpable()
    own = syscalls.call("setfsuid", uid)
    try:
        yield
    finally:
        syscalls.call("setfsuid", own)
        process.set_dumpable(dumpable)  # what the change took
