"""Checking an image against its hash tree and root hash: block by block as the kernel does, or as a whole."""

import errno
import os
import threading
from collections import OrderedDict
from contextlib import closing

from attrs import define, field

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.dm_verity.parameters import SUPERBLOCK_SIZE, Parameters, check_hash_offset
from ipe_emu.integrity.dm_verity.superblock import Superblock
from ipe_emu.integrity.dm_verity.tree import check_data_size, compute_root_hash, size_of
from ipe_emu.integrity.hash_workers import Progress, hash_file, no_progress
from ipe_emu.integrity.merkle import Shape

#: Bytes of verified hash blocks that are kept.
_CACHE_BYTES = 4 << 20
_READ_BYTES = 1 << 20


class CorruptedError(KernelError):
    """A block is not what the root hash vouches for: EIO, as reading it is on the kernel.

    ``level`` is None for a data block, else the level in the hash tree; ``block`` is the number of the first bad
    block there.
    """

    def __init__(self, reason: str, level: int | None, block: int) -> None:
        super().__init__(errno.EIO, reason, "verity_handle_err")
        self.level = level
        self.block = block


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
    shape: Shape = field(init=False, repr=False)
    level_offsets: tuple[int, ...] = field(init=False, repr=False)
    _data_hasher: BlockHasher = field(init=False, repr=False)
    _tree_hasher: BlockHasher = field(init=False, repr=False)
    _cache: "OrderedDict[tuple[int, int], bytes]" = field(factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        p = self.parameters
        self.shape = p.shape
        self.level_offsets = p.level_offsets(self.tree_offset)
        self._data_hasher = p.data_hasher()
        self._tree_hasher = p.tree_hasher()
        if len(self.root_hash) != p.digest_size:
            raise UserError(f"root hash has {len(self.root_hash)} bytes, and {p.algorithm} has {p.digest_size}")
        check_data_size(self.data_fd, p)
        size = size_of(self.hash_fd)
        if p.tree_size and size < self.tree_offset + p.tree_size:
            raise UserError(
                f"the hash tree of {p.data_blocks} data blocks has {p.tree_size} bytes from byte {self.tree_offset} on;"
                f" the hash image has {size} bytes"
            )

    @classmethod
    def from_superblock(cls, root_hash: bytes, data_fd: int, hash_fd: int, hash_offset: int = 0) -> "DmVerity":
        """Open an image whose superblock is at ``hash_offset`` of the hash image. UserError as ``Superblock.parse``."""
        check_hash_offset(hash_offset)
        parameters = Superblock.parse(os.pread(hash_fd, SUPERBLOCK_SIZE, hash_offset)).parameters
        return cls(parameters, root_hash, data_fd, hash_fd, parameters.tree_offset(hash_offset, superblock=True))

    # --- block by block ----------------------------------------------------------------------------------------

    def read_block(self, number: int) -> bytes:
        """Return a data block if the tree vouches for it. CorruptedError if not; IndexError behind the end."""
        size = self.parameters.data_block_size
        self._check_number(number)
        block = self._read(self.data_fd, number * size, size)
        self.verify_block(number, block)
        return block

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on, fewer at the end of the data, all of them verified."""
        p = self.parameters
        end = min(offset + length, p.data_size)
        if offset < 0 or end <= offset:
            return b""
        first, last = offset // p.data_block_size, (end - 1) // p.data_block_size
        data = b"".join(self.read_block(number) for number in range(first, last + 1))
        start = offset - first * p.data_block_size
        return data[start : start + end - offset]

    def verify_block(self, number: int, block: bytes) -> None:
        """Raise CorruptedError if ``block`` is not data block ``number``; IndexError behind the end.

        Source: ``verity_verify_io`` (drivers/md/dm-verity-target.c).
        """
        self._check_number(number)
        if len(block) != self.parameters.data_block_size:
            raise ValueError(f"a data block has {self.parameters.data_block_size} bytes, not {len(block)}")
        found = self._data_hasher.hash_block(block)[: len(self.root_hash)]
        with self._lock:
            expected = self._expected(0, number)
        if found != expected:
            raise self._bad_data(number, found, expected)

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.parameters.data_blocks:
            raise IndexError(f"there is no data block {number}")

    def _expected(self, level: int, number: int) -> bytes:
        """Return the digest that block ``number`` below ``level`` must have; hash blocks are verified from the top."""
        if level == len(self.level_offsets):
            return self.root_hash
        block, slot = divmod(number, self.shape.per_block)
        start = slot * self.shape.slot_size
        return self._hash_block(level, block)[start : start + len(self.root_hash)]

    def _hash_block(self, level: int, number: int) -> bytes:
        if (level, number) in self._cache:
            self._cache.move_to_end((level, number))
            return self._cache[level, number]
        expected = self._expected(level + 1, number)
        p = self.parameters
        block = self._read(self.hash_fd, self.level_offsets[level] + number * p.hash_block_size, p.hash_block_size)
        found = self._tree_hasher.hash_block(block)[: len(self.root_hash)]
        if found != expected:
            raise self._bad_hash(level, number, found, expected)
        self._cache[level, number] = block
        while len(self._cache) > max(16, _CACHE_BYTES // p.hash_block_size):
            self._cache.popitem(last=False)
        return block

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
            raise self._bad_data(0, found, self.root_hash)

    def _verify_tree(self) -> None:
        p = self.parameters
        sizes = self.shape.level_sizes(p.data_blocks)
        hasher = p.tree_hasher()  # its own: another thread may be reading
        for level in reversed(range(len(sizes))):
            number = 0
            digests = hash_file(self.hash_fd, hasher, sizes[level], offset=self.level_offsets[level])
            with closing(digests):
                for digest in digests:
                    for _ in range(digest.repeat):
                        for start in range(0, len(digest.slots), hasher.slot_size):
                            found = digest.slots[start : start + len(self.root_hash)]
                            expected = self._stored(level + 1, number)
                            if found != expected:
                                raise self._bad_hash(level, number, found, expected)
                            number += 1

    def _stored(self, level: int, number: int) -> bytes:
        """Return a digest as the tree has it, unverified; levels are read in order, so one block is enough to keep."""
        p = self.parameters
        if level == len(self.level_offsets):
            return self.root_hash
        block, slot = divmod(number, self.shape.per_block)
        position = self.level_offsets[level] + block * p.hash_block_size + slot * self.shape.slot_size
        return self._read(self.hash_fd, position, len(self.root_hash))

    def _compare_with_tree(self, level: int, first: int, block: bytes, repeat: int) -> None:
        start = self.level_offsets[level] + first * len(block)
        at_once = max(1, _READ_BYTES // len(block))
        for done in range(0, repeat, at_once):
            count = min(at_once, repeat - done)
            stored = self._read(self.hash_fd, start + done * len(block), count * len(block))
            if stored == block * count:
                continue
            for number in range(count):
                found = stored[number * len(block) : (number + 1) * len(block)]
                if found != block:
                    raise self._difference(level, first + done + number, found, block)

    def _difference(self, level: int, number: int, stored: bytes, computed: bytes) -> CorruptedError:
        """Say what a hash block, which its parent vouches for, does not say of the data."""
        p = self.parameters
        size = self.shape.slot_size
        for slot in range(self.shape.per_block):
            below = number * self.shape.per_block + slot
            start = slot * size
            found, expected = (b[start : start + len(self.root_hash)] for b in (computed, stored))
            if level == 0 and below < p.data_blocks and found != expected:
                return self._bad_data(below, found, expected)
        return CorruptedError(f"hash block {number} of level {level} has data where zeros belong", level, number)

    # --- helpers -----------------------------------------------------------------------------------------------

    def _bad_data(self, number: int, found: bytes, expected: bytes) -> CorruptedError:
        p = self.parameters
        if p.data_blocks == 1:
            return self._wrong_root(found, expected, None)
        return CorruptedError(
            f"data block {number} (at byte {number * p.data_block_size}) is corrupted: its digest is"
            f" {found.hex()}, and the hash tree says {expected.hex()}",
            None,
            number,
        )

    def _bad_hash(self, level: int, number: int, found: bytes, expected: bytes) -> CorruptedError:
        if level == len(self.level_offsets) - 1:
            return self._wrong_root(found, expected, level)
        position = self.level_offsets[level] + number * self.parameters.hash_block_size
        return CorruptedError(
            f"hash block {number} of level {level} (at byte {position}) is corrupted:"
            f" its digest is {found.hex()}, and the level above says {expected.hex()}",
            level,
            number,
        )

    def _wrong_root(self, found: bytes, expected: bytes, level: int | None) -> CorruptedError:
        return CorruptedError(
            f"root hash is {found.hex()}, not {expected.hex()}: another image's, or the topmost block is corrupted",
            level,
            0,
        )

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        data = os.pread(fd, length, offset)
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                raise KernelError(errno.EIO, f"the image ends at byte {offset + len(data)}", "verity_read")
            data += more
        return data
