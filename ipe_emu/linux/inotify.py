"""Being told when an inode is no more (inotify(7)), so that another one that gets its number is not taken for it."""

import fcntl
import os
import struct
import termios
from typing import Final

from ipe_emu.linux import syscalls

_IN_DELETE_SELF: Final = 0x400
_IN_IGNORED: Final = 0x8000
_IN_Q_OVERFLOW: Final = 0x4000
_EVENT: Final = struct.Struct("=iIII")
_READ_SIZE: Final = 4096


class InodeWatch:
    """Inodes that are held: while one is, the kernel gives its number to no other.

    It lets go of an inode that was deleted, or whose file system was unmounted. Both stay possible all the time, and
    are told in the order in which they happen: who asks ``ended`` before he looks at a number is not deceived.
    """

    def __init__(self) -> None:
        self._fd = -1  # most rehearsals hold nothing, and a user may have few
        self._held: set[int] = set()

    def hold(self, fd: int) -> int:
        """Hold the inode that ``fd``, O_PATH too, is open on; return what ``ended`` will call it.

        OSError: ENOSPC or EMFILE if this user watches too much already, EACCES if he may not read the file.
        """
        if self._fd < 0:
            self._fd = syscalls.call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        path = b"/proc/self/fd/%d" % fd
        name = syscalls.call("inotify_add_watch", self._fd, path, _IN_DELETE_SELF)
        self._held.add(name)
        return name

    def ended(self) -> set[int]:
        """Return the names of those that were let go of since the last call, or may have been."""
        found: set[int] = set()
        while self._held and self._pending():
            data = os.read(self._fd, _READ_SIZE)
            position = 0
            while position < len(data):
                name, mask, _, length = _EVENT.unpack_from(data, position)
                if mask & _IN_Q_OVERFLOW:  # something was not told
                    found |= self._held
                elif mask & _IN_IGNORED:
                    found.add(name)
                position += _EVENT.size + length
        self._held -= found
        return found

    def _pending(self) -> bool:
        size = bytearray(4)
        fcntl.ioctl(self._fd, termios.FIONREAD, size)
        return any(size)

    def close(self) -> None:
        """Hold nothing any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
