"""The initramfs buffer: what lies in memory where the boot loader put it, one file behind the other."""

import os
from collections.abc import Iterator, Sequence
from typing import Final

from attrs import field, frozen

#: A boot loader starts each further image at a multiple of this (GRUB, systemd-stub), with zeros before it.
_ALIGNMENT: Final = 4
_CHUNK: Final = 256 << 10


@frozen
class Piece:
    """``size`` bytes of the open file ``fd`` from ``offset`` on."""

    fd: int
    offset: int
    size: int


@frozen
class Buffer:
    """Pieces of files as one range of bytes. Nothing is kept in memory; the files belong to who made this."""

    pieces: tuple[Piece, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False)
    size: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        starts = []
        end = 0
        for piece in self.pieces:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            starts.append(start)
            end = start + piece.size
        object.__setattr__(self, "_starts", tuple(starts))
        object.__setattr__(self, "size", end)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on, fewer at the end. OSError as pread(2)."""
        parts: list[bytes] = []
        for start, piece in zip(self._starts, self.pieces, strict=True):
            if length > 0 and start > offset:  # the padding before a piece
                zeros = min(start - offset, length)
                parts.append(bytes(zeros))
                offset, length = offset + zeros, length - zeros
            inside = offset - start
            wanted = min(length, piece.size - inside)
            while wanted > 0:
                data = os.pread(piece.fd, wanted, piece.offset + inside)
                if not data:
                    return b"".join(parts)  # the file was cut meanwhile
                parts.append(data)
                inside, wanted = inside + len(data), wanted - len(data)
                offset, length = offset + len(data), length - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self, offset: int, *, size: int = _CHUNK) -> Iterator[bytes]:
        """Yield everything from ``offset`` to the end, ``size`` bytes at a time."""
        while data := self.read(offset, size):
            yield data
            offset += len(data)


def whole_files(fds: Sequence[int]) -> Buffer:
    """Return the buffer of whole files."""
    return Buffer(tuple(Piece(fd, 0, os.fstat(fd).st_size) for fd in fds))
