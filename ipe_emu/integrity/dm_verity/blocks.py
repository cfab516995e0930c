"""Reading data blocks against a hash tree, each when it is asked for, as the kernel does."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.dm_verity.parameters import Parameters
from ipe_emu.integrity.merkle import Shape

#: Bytes of verified hash blocks that are kept.
_CACHE_BYTES = 4 << 20

#: Reads so many bytes from an offset on; KernelError EIO if they are not all there.
Read = Callable[[int, int], bytes]


class CorruptedError(KernelError):
    """A block is not what the root hash vouches for: EIO, as reading it is on the kernel.

    ``level`` is None for a data block, else the level in the hash tree; ``block`` is the number of the first bad
    block there.
    """

    def __init__(self, reason: str, level: int | None, block: int) -> None:
        super().__init__(errno.EIO, reason, "verity_handle_err")
        self.level = level
        self.block = block


def reader(fd: int) -> Read:
    """Return what reads an open file."""

    def read(offset: int, length: int) -> bytes:
        data = os.pread(fd, length, offset)
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                raise KernelError(errno.EIO, f"the image ends at byte {offset + len(data)}", "verity_read")
            data += more
        return data

    return read


@define(eq=False)
class VerifiedBlocks:
    """Data blocks, read and verified one by one. Safe for threads.

    ``read_data`` and ``read_tree`` read the two devices; the tree begins at byte ``tree_offset`` of its own. With
    ``ignore_zero_blocks``, a block whose digest is that of zeros is zeros, whatever the data says. UserError if the
    root hash has the wrong length.
    """

    parameters: Parameters
    root_hash: bytes = field(repr=bytes.hex)
    read_data: Read = field(repr=False)
    read_tree: Read = field(repr=False)
    tree_offset: int
    ignore_zero_blocks: bool = False
    shape: Shape = field(init=False, repr=False)
    level_offsets: tuple[int, ...] = field(init=False, repr=False)
    _data_hasher: BlockHasher = field(init=False, repr=False)
    _tree_hasher: BlockHasher = field(init=False, repr=False)
    _zero_digest: bytes | None = field(default=None, init=False, repr=False)
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
        if self.ignore_zero_blocks:
            self._zero_digest = self._digest_of(bytes(p.data_block_size))

    def read_block(self, number: int) -> bytes:
        """Return a data block if the tree vouches for it. CorruptedError if not; IndexError behind the end."""
        size = self.parameters.data_block_size
        self._check_number(number)
        if self._zero_digest is not None:
            with self._lock:
                if self._expected(0, number) == self._zero_digest:
                    return bytes(size)
        block = self.read_data(number * size, size)
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
        found = self._digest_of(block)
        with self._lock:
            expected = self._expected(0, number)
        if found != expected:
            raise self.bad_data(number, found, expected)

    def _digest_of(self, block: bytes) -> bytes:
        return self._data_hasher.hash_block(block)[: len(self.root_hash)]

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
        block = self.read_tree(self.level_offsets[level] + number * p.hash_block_size, p.hash_block_size)
        found = self._tree_hasher.hash_block(block)[: len(self.root_hash)]
        if found != expected:
            raise self.bad_hash(level, number, found, expected)
        self._cache[level, number] = block
        while len(self._cache) > max(16, _CACHE_BYTES // p.hash_block_size):
            self._cache.popitem(last=False)
        return block

    # --- what is wrong -------------------------------------------------------------------------------------------

    def bad_data(self, number: int, found: bytes, expected: bytes) -> CorruptedError:
        """Return the error of a data block with the digest ``found``."""
        p = self.parameters
        if p.data_blocks == 1:
            return self._wrong_root(found, expected, None)
        return CorruptedError(
            f"data block {number} (at byte {number * p.data_block_size}) is corrupted: its digest is"
            f" {found.hex()}, and the hash tree says {expected.hex()}",
            None,
            number,
        )

    def bad_hash(self, level: int, number: int, found: bytes, expected: bytes) -> CorruptedError:
        """Return the error of a hash block with the digest ``found``."""
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
