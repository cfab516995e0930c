"""What a block device holds: bytes that can be read and, on some, written."""

import errno
import os
import tempfile
import threading
from typing import Final, Protocol

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, UserError

SECTOR: Final = 512
#: What the overlay of a disk keeps of a write is whole pieces of this size.
_PIECE: Final = 4096


class Content(Protocol):
    """The bytes of a device. Safe for threads."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""

    @property
    def read_only(self) -> bool:
        """Whether every write fails."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on, fewer at the end; KernelError EIO where reading fails."""

    def write(self, offset: int, data: bytes) -> int:
        """Write what fits and return its length. KernelError: ENOSPC at the end, EPERM if read-only, EIO."""


def fits(content: Content, offset: int, length: int) -> int:
    """Return how many of ``length`` bytes can be written from ``offset`` on (``blkdev_write_iter()``).

    KernelError EPERM where nothing can, ENOSPC at the end.
    """
    if content.read_only:
        raise KernelError(errno.EPERM, "the device is read-only", "blkdev_write_iter")
    if offset < 0 or (offset >= content.size and length):
        raise KernelError(errno.ENOSPC, "behind the end of the device", "blkdev_write_iter")
    return min(length, content.size - offset)


@define(eq=False)
class ImageFile:
    """A disk image, an open file or block device; closed by ``close``.

    Without ``write_through``, what is written is kept beside it until then, and the image stays as it is.
    """

    _fd: int
    read_only: bool = False
    write_through: bool = False
    size: int = field(init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)
    _overlay: int | None = field(default=None, init=False, repr=False)
    #: One bit for each piece that is in the overlay.
    _kept: bytearray = field(factory=bytearray, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        if not self.size or self.size % SECTOR:
            raise UserError(
                f"the image has {self.size} bytes: a disk has a multiple of {SECTOR} bytes, and at least one"
            )

    def read(self, offset: int, length: int) -> bytes:
        """See `Content.read`."""
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        if self._overlay is None:
            return _pread(self._fd, end - offset, offset)
        found = []
        with self._lock:
            while offset < end:
                run = self._run_from(offset, end)
                source = self._overlay if self._is_kept(offset // _PIECE) else self._fd
                found.append(_pread(source, run - offset, offset))
                offset = run
        return b"".join(found)

    def write(self, offset: int, data: bytes) -> int:
        """See `Content.write`."""
        data = data[: fits(self, offset, len(data))]
        try:
            if self.write_through:
                pwrite(self._fd, data, offset)
            elif data:
                with self._lock:
                    self._keep(offset, data)
        except OSError as error:
            raise KernelError(
                errno.EIO, f"the image cannot be written: {error.strerror}", "blkdev_write_iter"
            ) from None
        return len(data)

    def close(self) -> None:
        """Close the image, and forget what was written beside it."""
        os.close(self._fd)
        if self._overlay is not None:
            os.close(self._overlay)

    def _is_kept(self, piece: int) -> bool:
        return bool(self._kept[piece >> 3] >> (piece & 7) & 1)

    def _run_from(self, offset: int, end: int) -> int:
        """Return where the bytes end that come from the same file as those at ``offset``."""
        piece = offset // _PIECE
        kept = self._is_kept(piece)
        while piece * _PIECE < end and self._is_kept(piece) == kept:
            piece += 1
        return min(piece * _PIECE, end)

    def _keep(self, offset: int, data: bytes) -> None:
        if self._overlay is None:
            self._kept = bytearray(-(-self.size // _PIECE) // 8 + 1)
            with tempfile.TemporaryFile() as file:
                self._overlay = os.dup(file.fileno())
        for piece in {offset // _PIECE, (offset + len(data) - 1) // _PIECE}:
            if not self._is_kept(piece):  # what is written may not fill it
                pwrite(
                    self._overlay,
                    _pread(self._fd, min(_PIECE, self.size - piece * _PIECE), piece * _PIECE),
                    piece * _PIECE,
                )
        pwrite(self._overlay, data, offset)
        for piece in range(offset // _PIECE, (offset + len(data) - 1) // _PIECE + 1):
            self._kept[piece >> 3] |= 1 << (piece & 7)


@frozen(eq=False)
class Slice:
    """A part of another content: a partition, or what a linear target maps. The part lies within the whole."""

    whole: Content
    start: int
    size: int
    _read_only: bool = False

    @property
    def read_only(self) -> bool:
        """Whether every write fails."""
        return self._read_only or self.whole.read_only

    def read(self, offset: int, length: int) -> bytes:
        """See `Content.read`."""
        end = min(offset + length, self.size)
        return self.whole.read(self.start + offset, end - offset) if 0 <= offset < end else b""

    def write(self, offset: int, data: bytes) -> int:
        """See `Content.write`."""
        return self.whole.write(self.start + offset, data[: fits(self, offset, len(data))])


@frozen(eq=False)
class Concatenation:
    """Contents one behind the other: a table of several targets."""

    parts: tuple[Content, ...]
    read_only: bool
    size: int = field(init=False)

    @size.default
    def _sum(self) -> int:
        return sum(part.size for part in self.parts)

    def read(self, offset: int, length: int) -> bytes:
        """See `Content.read`."""
        found = []
        for part in self.parts:
            if offset < part.size and length > 0:
                found.append(part.read(offset, length))
                length -= len(found[-1])
                offset = part.size
            offset -= part.size
        return b"".join(found)

    def write(self, offset: int, data: bytes) -> int:
        """See `Content.write`."""
        data = data[: fits(self, offset, len(data))]
        done = 0
        for part in self.parts:
            if offset < part.size and done < len(data):
                done += part.write(offset, data[done : done + part.size - offset])
                offset = part.size
            offset -= part.size
        return done


def _pread(fd: int, length: int, offset: int) -> bytes:
    try:
        found = os.pread(fd, length, offset)
        while len(found) < length:
            more = os.pread(fd, length - len(found), offset + len(found))
            if not more:
                raise KernelError(errno.EIO, f"the image ends at byte {offset + len(found)}, as it did not before", "")
            found += more
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(errno.EIO, f"the image cannot be read: {error.strerror}", "blkdev_read_iter") from None
    return found


def pwrite(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; OSError."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
