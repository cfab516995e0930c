"""The target crypt, for scratch disks (dm-crypt.c): nothing is encrypted, and nothing that is on the disk decrypted.

What a program writes it reads again, and all else is noise, as under a key that nobody used before. Whoever has data on
the disk gets noise in its place, and so fails here where a kernel with the right key would not.
"""

import errno
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.rehearse.block.content import SECTOR, fits, pwrite
from ipe_emu.rehearse.block.device import BlockDevice
from ipe_emu.rehearse.device_mapper.arguments import unsigned, unsigned_long_long
from ipe_emu.rehearse.device_mapper.target import Table

_PIECE: Final = 4096
#: How many pieces are kept of what is written (2 GiB); each also takes some memory.
_MOST_KEPT: Final = 1 << 19
_HEX: Final = re.compile(rb"(?:[0-9a-fA-F]{2})+")
#: The ciphers that every kernel of a distribution has, and the sizes of their keys in bytes.
_XTS: Final = frozenset({32, 48, 64})
_CBC: Final = frozenset({16, 24, 32})
_CIPHER: Final = re.compile(rb"aes-(?:(xts)-plain(?:64)?|cbc-(?:plain|plain64|essiv:sha256))")
_OPTIONS: Final = frozenset({
    b"allow_discards", b"same_cpu_crypt", b"high_priority", b"submit_from_crypt_cpus", b"no_read_workqueue",
    b"no_write_workqueue",
})  # fmt: skip
_MOST_OPTIONS: Final = 9


@define(eq=False)
class Scratch:
    """A content that begins as noise. Safe for threads. What is written goes to an unnamed file, piece behind piece.

    ``not_judged`` is told where no more can be kept: the write fails with EIO, which a kernel's would not.
    """

    size: int
    read_only: bool
    not_judged: Callable[[str], None] = field(repr=False)
    most_kept: int = _MOST_KEPT
    _seed: bytes = field(factory=lambda: os.urandom(16), repr=False)
    #: Which piece of the file holds a piece that was written.
    _kept: dict[int, int] = field(factory=dict, init=False, repr=False)
    _file: int = field(default=-1, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def read(self, offset: int, length: int) -> bytes:
        """See `Content.read`."""
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        first = offset // _PIECE
        with self._lock:
            data = b"".join(self._piece(number) for number in range(first, (end - 1) // _PIECE + 1))
        start = offset - first * _PIECE
        return data[start : start + end - offset]

    def write(self, offset: int, data: bytes) -> int:
        """See `Content.write`."""
        data = data[: fits(self, offset, len(data))]
        try:
            with self._lock:
                self._write(offset, data)
        except OSError as error:
            reason = f"what is written to a scratch disk cannot be kept: {error.strerror}"
            self.not_judged(reason)
            raise KernelError(errno.EIO, reason, "blkdev_write_iter") from None
        return len(data)

    def _write(self, offset: int, data: bytes) -> None:
        if self._file < 0:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, _PIECE)
            part = data[done : done + _PIECE - start]
            piece = self._piece(number)
            place = self._kept.get(number, len(self._kept))
            if place >= self.most_kept:
                raise OSError(errno.EFBIG, f"it is more than {self.most_kept * _PIECE} bytes")
            pwrite(self._file, piece[:start] + part + piece[start + len(part) :], place * _PIECE)
            self._kept[number] = place
            done += len(part)

    def _piece(self, number: int) -> bytes:
        place = self._kept.get(number)
        if place is not None:
            return os.pread(self._file, _PIECE, place * _PIECE)
        return hashlib.shake_128(self._seed + number.to_bytes(8, "little")).digest(_PIECE)


@frozen(eq=False)
class Crypt:
    """A target crypt. ``words`` are its cipher, key and offset, as they were given."""

    length: int
    device: BlockDevice
    start: int
    words: tuple[bytes, bytes, bytes]
    options: tuple[bytes, ...]
    content: Scratch
    block_size: int = SECTOR
    facts: Facts = NO_FACTS
    type: str = field(default="crypt", init=False)

    @property
    def area(self) -> tuple[BlockDevice, int]:
        """See `Target.area`."""
        return self.device, self.start

    def info(self) -> bytes:
        """Return its status, which is empty."""
        return b""

    def table(self) -> bytes:
        """Return its arguments (``crypt_status()``)."""
        count = [b"%d" % len(self.options)] if self.options else []
        return b" ".join([*self.words, self.device.shown.encode(), b"%d" % self.start, *count, *self.options])


def crypt(table: Table, length: int, words: list[bytes]) -> Crypt:
    """Make a target crypt (``crypt_ctr()``): cipher, key, first IV, device, first sector, options.

    NotJudgedError for other ciphers than AES, keys from a keyring, and options that change what is stored.
    """
    if len(words) < 5:
        raise _invalid(f"{len(words)} arguments; there are 5 at least")
    options = _options(words[5:])
    cipher = _CIPHER.fullmatch(words[0])
    if cipher is None or words[1].startswith(b":"):
        raise NotJudgedError(f"a crypt target with {os.fsdecode(words[0][:50])!r}, or a key from a keyring")
    if not _HEX.fullmatch(words[1]) or len(words[1]) // 2 not in (_XTS if cipher[1] else _CBC):
        raise _invalid("no key for this cipher")
    offset = unsigned_long_long(words[2])
    if offset is None:
        raise _invalid("no offset for the initialisation vector")
    device = table.get_device(words[3])
    start = unsigned_long_long(words[4])
    if start is None:
        raise _invalid("no sector of the device")
    table.remark(f"{table.owner_name} is not encrypted, and what is on {device.name} not decrypted: a scratch disk")
    given = (words[0], words[1].lower(), b"%d" % offset)
    return Crypt(length, device, start, given, options, Scratch(length * SECTOR, table.read_only, table.not_judged))


def _options(words: list[bytes]) -> tuple[bytes, ...]:
    if not words:
        return ()
    count = unsigned(words[0])
    if count is None or count > _MOST_OPTIONS or count > len(words) - 1:
        raise _invalid("not the number of optional arguments")
    options = tuple(word.lower() for word in words[1 : 1 + count])
    if unknown := [word for word in options if word not in _OPTIONS]:
        raise NotJudgedError(f"the crypt option {os.fsdecode(unknown[0][:50])!r}")
    return options


def _invalid(reason: str) -> KernelError:
    return KernelError(errno.EINVAL, reason, "crypt_ctr")
