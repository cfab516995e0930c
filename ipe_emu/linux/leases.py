"""Asking the kernel whether anybody has a file open for writing, by a lease (fcntl(2))."""

import errno
import fcntl
import signal
from typing import Final

_SET_SIGNAL: Final = 10


def is_open_for_writing(fd: int) -> bool | None:
    """Whether the file that ``fd`` was opened to read is open for writing, through whatever mount and by anybody.

    It is so by the count that ``deny_write_access()`` goes by, which leaves out a descriptor of memfd_create(2). None
    where the kernel does not say: it gives leases to who owns the file or has CAP_LEASE, and not on every file system.
    """
    # Whoever opens the file for writing while the lease is held waits for its end; its holder is sent a signal, which
    # must not be the usual SIGIO, that would kill us.
    fcntl.fcntl(fd, _SET_SIGNAL, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
