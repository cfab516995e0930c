"""Checking an image against its hash tree and root hash: block by block as the kernel does, or as a whole."""

from contextlib import closing

from attrs import define, field

from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity.blocks import CorruptedError, VerifiedBlocks, reader
from ipe_emu.integrity.dm_verity.parameters import Parameters
from ipe_emu.integrity.dm_verity.tree import check_data_size, compute_root_hash, size_of
from ipe_emu.integrity.hash_workers import Progress, hash_file, no_progress

_READ_BYTES = 1 << 20


@define(eq=False)
class DmVerity:
    """An image with its hash tree, both open files, and the root hash they must have. Safe for threads.

    UserError if the files are too short for what ``parameters`` say, or the root hash has the wrong length.
    """

    parameters: Parameters
    root_hash: bytes = field(repr=bytes.hex)
    data_fd: int
    hash_fd: int
    tree_offset: int
    blocks: VerifiedBlocks = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        p = self.parameters
        self.blocks = VerifiedBlocks(p, self.root_hash, reader(self.data_fd), reader(self.hash_fd), self.tree_offset)
        check_data_size(self.data_fd, p)
        size = size_of(self.hash_fd)
        if p.tree_size and size < self.tree_offset + p.tree_size:
            raise UserError(
                f"the hash tree of {p.data_blocks} data blocks has {p.tree_size} bytes from byte {self.tree_offset} on;"
                f" the hash image has {size} bytes"
            )

    # --- block by block ----------------------------------------------------------------------------------------

    def read_block(self, number: int) -> bytes:
        """See `VerifiedBlocks.read_block`."""
        return self.blocks.read_block(number)

    def read(self, offset: int, length: int) -> bytes:
        """See `VerifiedBlocks.read`."""
        return self.blocks.read(offset, length)

    def verify_block(self, number: int, block: bytes) -> None:
        """See `VerifiedBlocks.verify_block`."""
        self.blocks.verify_block(number, block)

    # --- as a whole --------------------------------------------------------------------------------------------

    def verify(self, *, jobs: int = 1, progress: Progress = no_progress) -> None:
        """Check all of the tree and all of the data. CorruptedError names the first bad block.

        The tree is checked from its root down, so that what is wrong in the data is told from what is wrong in the
        tree. Like ``veritysetup verify``, and unlike the kernel, it insists on zeros where the tree is unused.
        """
        self._verify_tree()
        found = compute_root_hash(
            self.data_fd, self.parameters, jobs=jobs, progress=progress, write=self._compare_with_tree
        )
        if found != self.root_hash:
            raise self.blocks.bad_data(0, found, self.root_hash)

    def _verify_tree(self) -> None:
        p = self.parameters
        sizes = self.blocks.shape.level_sizes(p.data_blocks)
        hasher = p.tree_hasher()  # its own: another thread may be reading
        for level in reversed(range(len(sizes))):
            number = 0
            digests = hash_file(self.hash_fd, hasher, sizes[level], offset=self.blocks.level_offsets[level])
            with closing(digests):
                for digest in digests:
                    for _ in range(digest.repeat):
                        for start in range(0, len(digest.slots), hasher.slot_size):
                            found = digest.slots[start : start + len(self.root_hash)]
                            expected = self._stored(level + 1, number)
                            if found != expected:
                                raise self.blocks.bad_hash(level, number, found, expected)
                            number += 1

    def _stored(self, level: int, number: int) -> bytes:
        """Return a digest as the tree has it, unverified; levels are read in order, so one block is enough to keep."""
        p = self.parameters
        if level == len(self.blocks.level_offsets):
            return self.root_hash
        block, slot = divmod(number, self.blocks.shape.per_block)
        position = self.blocks.level_offsets[level] + block * p.hash_block_size + slot * self.blocks.shape.slot_size
        return self.blocks.read_tree(position, len(self.root_hash))

    def _compare_with_tree(self, level: int, first: int, block: bytes, repeat: int) -> None:
        start = self.blocks.level_offsets[level] + first * len(block)
        at_once = max(1, _READ_BYTES // len(block))
        for done in range(0, repeat, at_once):
            count = min(at_once, repeat - done)
            stored = self.blocks.read_tree(start + done * len(block), count * len(block))
            if stored == block * count:
                continue
            for number in range(count):
                found = stored[number * len(block) : (number + 1) * len(block)]
                if found != block:
                    raise self._difference(level, first + done + number, found, block)

    def _difference(self, level: int, number: int, stored: bytes, computed: bytes) -> CorruptedError:
        """Say what a hash block, which its parent vouches for, does not say of the data."""
        p = self.parameters
        size = self.blocks.shape.slot_size
        for slot in range(self.blocks.shape.per_block):
            below = number * self.blocks.shape.per_block + slot
            start = slot * size
            found, expected = (b[start : start + len(self.root_hash)] for b in (computed, stored))
            if level == 0 and below < p.data_blocks and found != expected:
                return self.blocks.bad_data(below, found, expected)
        return CorruptedError(f"hash block {number} of level {level} has data where zeros belong", level, number)
