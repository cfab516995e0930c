"""Whether somebody has a file open for writing: then the kernel neither executes it nor reads modules from it."""

import errno
import os
import re
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import path_of
from ipe_emu.linux.leases import is_open_for_writing

# Between these, a kernel executes what is open for writing (do_open_execat() without deny_write_access()).
_FIRST_WITHOUT: Final = (6, 11)
_FIRST_AGAIN: Final = (6, 13)


def is_denied_by(release: str) -> bool:
    """Whether a kernel of this release (uname(2)) refuses to execute a file that is open for writing."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and not _FIRST_WITHOUT <= (int(found[1]), int(found[2])) < _FIRST_AGAIN


#: Whether this machine's kernel does.
IS_DENIED_BY_KERNEL: Final = is_denied_by(os.uname().release)


def deny_write_access(fd: int, *, certain: bool) -> None:
    """Raise KernelError ETXTBSY, as the kernel does, if somebody can write to a file that ``fd`` was opened to read.

    Where that cannot be told, and the file's permissions let the rehearsed machine write to it, NotJudgedError if it is
    to be ``certain``.
    """
    busy = is_open_for_writing(fd, as_owner=certain)
    if busy:
        raise KernelError(errno.ETXTBSY, "somebody has it open for writing", "deny_write_access")
    if busy is None and certain and os.access(b"/proc/self/fd/%d" % fd, os.W_OK, effective_ids=True):
        raise NotJudgedError(f"{os.fsdecode(path_of(fd))}: whether somebody has it open for writing cannot be told")
