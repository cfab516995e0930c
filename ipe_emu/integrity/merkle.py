"""Merkle trees as dm-verity and fs-verity build them, streaming: memory is one block for each level of the tree.

Level 0 holds the digests of the data blocks, each in a slot; slots fill hash blocks, whose digests fill the level
above, until a level has a single block: the root hash is that block's digest. Data of a single block has no tree, and
the root hash is its digest. (Documentation/filesystems/fsverity.rst, "Merkle tree"; dm-verity is the same where its
hash type is 1, as drivers/md/dm-verity-target.c and cryptsetup's DMVerity page say.)
"""

from collections.abc import Callable

from attrs import frozen

#: Told of finished hash blocks: level, number of the first in its level, one block's content, how many are like it.
BlockWriter = Callable[[int, int, bytes, int], object]


@frozen
class Shape:
    """How digests lie in hash blocks. Sizes are bytes; the rest of a hash block behind its slots is zeros."""

    hash_block_size: int
    slot_size: int
    per_block: int

    def level_sizes(self, data_blocks: int) -> tuple[int, ...]:
        """The number of hash blocks of every level, from level 0 up; nothing for a single data block."""
        sizes = []
        count = data_blocks
        while count > 1:
            count = -(-count // self.per_block)
            sizes.append(count)
        return tuple(sizes)


def nothing_written(level: int, first: int, block: bytes, repeat: int) -> None:
    """Forget the hash blocks: only the root is wanted."""


class TreeBuilder:
    """Builds the tree from the digests of the data blocks, in order.

    ``hash_block`` gives a hash block's slot (its digest, padded).
    """

    def __init__(
        self, shape: Shape, hash_block: Callable[[bytes], bytes], write: BlockWriter = nothing_written
    ) -> None:
        self._shape = shape
        self._hash_block = hash_block
        self._write = write
        self._full = shape.per_block * shape.slot_size
        self._pending: list[bytearray] = [bytearray()]
        self._done: list[int] = [0]

    def add(self, slots: bytes, repeat: int = 1) -> None:
        """Add slots of level 0, a whole number of them; ``repeat`` counts for a single slot only."""
        if repeat == 1:
            self._add(0, slots)
        else:
            self._add_run(0, slots, repeat)

    def _add(self, level: int, slots: bytes) -> None:
        pending = self._pending[level]
        pending += slots
        full = len(pending) - len(pending) % self._full
        for start in range(0, full, self._full):
            self._finish(level, bytes(pending[start : start + self._full]))
        del pending[:full]

    def _add_run(self, level: int, slot: bytes, count: int) -> None:
        """Add ``count`` equal slots in a time that does not grow with their number, if nothing is written."""
        pending = len(self._pending[level]) // self._shape.slot_size
        head = min(count, (self._shape.per_block - pending) % self._shape.per_block)
        self._add(level, slot * head)
        blocks, tail = divmod(count - head, self._shape.per_block)
        if blocks:
            self._finish(level, slot * self._shape.per_block, blocks)
        self._add(level, slot * tail)

    def _finish(self, level: int, content: bytes, repeat: int = 1) -> None:
        block = content + bytes(self._shape.hash_block_size - len(content))
        if level + 1 == len(self._pending):
            self._pending.append(bytearray())
            self._done.append(0)
        self._write(level, self._done[level], block, repeat)
        self._done[level] += repeat
        parent = self._hash_block(block)
        if repeat == 1:
            self._add(level + 1, parent)
        else:
            self._add_run(level + 1, parent, repeat)

    def root(self) -> bytes:
        """Finish the tree and return the slot of its root; ValueError if there was no data."""
        level = 0
        while self._done[level] or len(self._pending[level]) > self._shape.slot_size:
            if self._pending[level]:
                content = bytes(self._pending[level])
                self._pending[level].clear()
                self._finish(level, content)
            level += 1
        if not self._pending[level]:
            raise ValueError("no data was added")
        return bytes(self._pending[level])
