"""Opening, reading and writing what a session serves beside the securityfs (`subtrees`)."""

import errno
import os
from collections.abc import Callable
from typing import Final

import trio
from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_securityfs.subtrees import Disk, DiskFile, ImageFile, TextFile
from ipe_securityfs.tree import Directory, Node

#: What the kernel reads of a block device at once, at least; where a read fails, what comes before is returned.
_PAGE: Final = 4096


@frozen
class _Open:
    """An open file. ``read`` reads so many bytes at an offset, in any thread; ``disk`` is what is written to."""

    node: Node
    read: Callable[[int, int], bytes]
    disk: Disk | None = None


class OpenFiles:
    """The open files, by handle. KernelError says what an operation fails with."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}

    async def open(self, fh: int, node: Node, flags: int) -> bool:
        """Open a node; return whether its pages may be kept from one open to the next."""
        if isinstance(node, Directory):
            raise KernelError(errno.EISDIR, "a directory", "do_open")
        if isinstance(node, DiskFile):
            node.disk.opened()
            self._open[fh] = _Open(node, _reader(node.disk), node.disk)
            return False
        if not isinstance(node, ImageFile | TextFile):
            raise KernelError(errno.ENXIO, "the kernel opens no device here", "do_dentry_open")
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            # fuse2fs (1.47.4) opens what it mounts for writing first, and takes no other answer for read-only.
            number = errno.EACCES if isinstance(node, ImageFile) else errno.EROFS
            raise KernelError(number, "this is for reading", "mnt_want_write")
        if isinstance(node, ImageFile):
            self._open[fh] = _Open(node, node.content.read)
            return True
        text = await trio.to_thread.run_sync(node.text)
        self._open[fh] = _Open(node, lambda offset, length: text[offset : offset + length])
        return False

    async def read(self, fh: int, offset: int, length: int) -> bytes:
        """Read in another thread: an image may lie on a file system that this very thread has a part in."""
        return await trio.to_thread.run_sync(self._open[fh].read, offset, length)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """Write in another thread, and return how much was."""
        disk = self._open[fh].disk
        if disk is None:
            raise KernelError(errno.EBADF, "this is for reading", "vfs_write")
        return await trio.to_thread.run_sync(disk.write, offset, bytes(data))

    def has(self, fh: int) -> bool:
        """Whether a handle is one of these."""
        return fh in self._open

    def node(self, fh: int) -> Node:
        """Return what a handle is open on."""
        return self._open[fh].node

    def release(self, fh: int) -> None:
        """Close it."""
        disk = self._open.pop(fh).disk
        if disk is not None:
            disk.closed()


def _reader(disk: Disk) -> Callable[[int, int], bytes]:
    """Return what reads a disk as read(2) does: up to the first page that cannot be read, if that is not at once."""

    def read(offset: int, length: int) -> bytes:
        try:
            return disk.read(offset, length)
        except KernelError:
            found = b""
            while len(found) < length:
                step = min(length - len(found), _PAGE - (offset + len(found)) % _PAGE)
                try:
                    found += disk.read(offset + len(found), step)
                except KernelError:
                    if found:
                        break
                    raise
            return found

    return read
