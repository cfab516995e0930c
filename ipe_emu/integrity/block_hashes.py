"""Hash many blocks of a file, each on its own: the inner loop of every Merkle tree.

The loop runs in C: one preadv(2) reads a batch of blocks between copies of the salt that already stand in the buffer,
and iterators of the standard library hash the records. A bytecode loop takes twice the time for each block.

This file is a program as well, the worker process of ``hash_workers``. It therefore imports nothing but the standard
library, and starts in a hundredth of a second.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from functools import partial
from itertools import starmap
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

_BATCH_BYTES = 256 << 10  # stays in the second-level cache
_IOV_MAX = 1024
#: A worker's task: offset and number of blocks. Its answer: an errno, 0 if digests follow.
TASK = struct.Struct("=QQ")
ANSWER = struct.Struct("=i")


class BlockHasher:
    """Digests of blocks of one size, each with ``prefix`` before and ``suffix`` behind it.

    ``constructor`` is hashlib's name; ``digest_size`` is bytes, for the algorithms where it is a parameter. Every
    digest is followed by zeros up to ``slot_size`` bytes.
    """

    def __init__(
        self, constructor: str, digest_size: int | None, block_size: int, slot_size: int, prefix: bytes, suffix: bytes
    ) -> None:
        self.parameters = (constructor, digest_size, block_size, slot_size, prefix.hex(), suffix.hex())
        new: Callable[..., _Hash] = getattr(hashlib, constructor, None) or partial(hashlib.new, constructor)
        self._new = new if digest_size is None else partial(new, digest_size=digest_size)
        self._digest = type(self._new()).digest
        self.digest_size = self._new().digest_size
        self.block_size = block_size
        self.slot_size = slot_size
        self._prefix = prefix
        self._suffix = suffix
        self._padding = bytes(slot_size - self.digest_size)
        self._record = struct.Struct(f"{len(prefix) + block_size + len(suffix)}s")
        self._buffer = memoryview(b"")
        self._blocks: list[memoryview] = []

    def _make_buffer(self) -> None:
        """Lay out a batch of records; done when files are read, because single blocks do not need it."""
        batch = max(1, min(_BATCH_BYTES // self.block_size, _IOV_MAX))
        self._buffer = memoryview(bytearray((self._prefix + bytes(self.block_size) + self._suffix) * batch))
        starts = range(len(self._prefix), self._record.size * batch, self._record.size)
        self._blocks = [self._buffer[start : start + self.block_size] for start in starts]

    def hash_block(self, block: bytes) -> bytes:
        """Return the slot of one block that is in memory."""
        return self._new(self._prefix + block + self._suffix).digest() + self._padding

    def hash_blocks(self, fd: int, offset: int, count: int) -> bytes:
        """Return the slots of ``count`` blocks of the open file, from ``offset`` on.

        EOFError if the file ends before; OSError as pread(2). Not for two threads at once.
        """
        if not self._blocks:
            self._make_buffer()
        found: list[bytes] = []
        while count:
            n = min(count, len(self._blocks))
            self._fill(fd, offset, n)
            records = self._record.iter_unpack(self._buffer[: n * self._record.size])
            found += map(self._digest, starmap(self._new, records))
            offset += n * self.block_size
            count -= n
        return self._padding.join(found) + self._padding

    def _fill(self, fd: int, offset: int, count: int) -> None:
        wanted = count * self.block_size
        got = os.preadv(fd, self._blocks[:count], offset)
        while got < wanted:  # only where the file system answers in pieces
            whole, part = divmod(got, self.block_size)
            rest = [self._blocks[whole][part:], *self._blocks[whole + 1 : count]]
            more = os.preadv(fd, rest, offset + got)
            if not more:
                raise EOFError(offset + got)
            got += more


def _serve(tasks: IO[bytes], answers: IO[bytes]) -> None:
    """Answer tasks until there are no more: the other side closed its end, or is dead."""
    fd, constructor, digest_size, block_size, slot_size, prefix, suffix = json.loads(tasks.readline())
    hasher = BlockHasher(constructor, digest_size, block_size, slot_size, bytes.fromhex(prefix), bytes.fromhex(suffix))
    while len(task := tasks.read(TASK.size)) == TASK.size:
        try:
            answer = ANSWER.pack(0) + hasher.hash_blocks(fd, *TASK.unpack(task))
        except EOFError:
            answer = ANSWER.pack(-1)
        except OSError as error:
            answer = ANSWER.pack(error.errno or -1)
        answers.write(answer)
        answers.flush()


def main() -> None:
    """Be a worker: the parameters in the first line of stdin, tasks behind it; answers to stdout."""
    import signal  # noqa: PLC0415 - the worker's alone

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the one it works for ends
    try:
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # nobody wants the answer any more, and python must not try again when it ends
        os._exit(0)


if __name__ == "__main__":
    main()
