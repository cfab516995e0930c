"""Opening and reading what a session serves beside the securityfs (`subtrees`)."""

import errno
import os
from collections.abc import Callable

import trio

from ipe_emu.errors import KernelError
from ipe_securityfs.subtrees import ImageFile, TextFile
from ipe_securityfs.tree import Directory, Node

#: Reads ``length`` bytes at an offset, in any thread.
_Read = Callable[[int, int], bytes]


class OpenFiles:
    """The open files, by handle. KernelError says what an operation fails with."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Node, _Read]] = {}

    async def open(self, fh: int, node: Node, flags: int) -> bool:
        """Open a node for reading; return whether its pages may be kept from one open to the next."""
        if isinstance(node, Directory):
            raise KernelError(errno.EISDIR, "a directory", "do_open")
        if not isinstance(node, ImageFile | TextFile):
            raise KernelError(errno.ENXIO, "the kernel opens no device here", "do_dentry_open")
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise KernelError(errno.EROFS, "this is for reading", "mnt_want_write")
        if isinstance(node, ImageFile):
            self._open[fh] = node, node.content.read
            return True
        text = await trio.to_thread.run_sync(node.text)
        self._open[fh] = node, lambda offset, length: text[offset : offset + length]
        return False

    async def read(self, fh: int, offset: int, length: int) -> bytes:
        """Read in another thread: an image may lie on a file system that this very thread has a part in."""
        return await trio.to_thread.run_sync(self._open[fh][1], offset, length)

    def node(self, fh: int) -> Node:
        """Return what a handle is open on."""
        return self._open[fh][0]

    def release(self, fh: int) -> None:
        """Close it."""
        del self._open[fh]
