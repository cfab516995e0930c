"""The fs-verity digest of a file's content (Documentation/filesystems/fsverity.rst, "File digest computation")."""

import errno
import hashlib
import os
import struct

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import Digest

#: The hash algorithms fs-verity knows, with their numbers in struct fsverity_descriptor.
HASH_ALGORITHMS = {"sha256": 1, "sha512": 2}
DEFAULT_BLOCK_SIZE = 4096
_CHUNK_BLOCKS = 256


def measure(fd: int, algorithm: str, *, block_size: int = DEFAULT_BLOCK_SIZE, salt: bytes = b"") -> Digest:
    """Compute the digest that FS_IOC_MEASURE_VERITY would give for the open file ``fd``, without sealing it.

    ``block_size`` is bytes, a power of two from 1024; ``salt`` at most 32 bytes. KernelError EINVAL for an algorithm
    that fs-verity does not have. Memory is bounded whatever the file's size.
    """
    if algorithm not in HASH_ALGORITHMS:
        raise KernelError(errno.EINVAL, f"fs-verity has no hash algorithm {algorithm!r}", "fsverity_get_hash_alg")
    tree = _MerkleTree(algorithm, block_size, salt)
    size = 0
    offset = 0
    while chunk := os.pread(fd, block_size * _CHUNK_BLOCKS, offset):
        offset += len(chunk)
        size += len(chunk)
        tree.add(chunk)
    root = tree.root()
    # struct fsverity_descriptor: version, hash_algorithm, log_blocksize, salt_size, sig_size, data_size,
    # root_hash[64], salt[32], reserved[144].
    descriptor = struct.pack(
        "<BBBBIQ64s32s144x",
        1, HASH_ALGORITHMS[algorithm], block_size.bit_length() - 1, len(salt), 0, size, root, salt,
    )  # fmt: skip
    return Digest(algorithm, hashlib.new(algorithm, descriptor).digest())


class _MerkleTree:
    """A Merkle tree that keeps one unfinished block of every level, so its memory is the tree's height."""

    def __init__(self, algorithm: str, block_size: int, salt: bytes) -> None:
        self._block_size = block_size
        # The salt is padded with zeros to the hash function's own block size.
        unsalted = hashlib.new(algorithm)
        padding = -len(salt) % unsalted.block_size
        unsalted.update(salt + bytes(padding))
        self._salted = unsalted
        self._levels: list[bytearray] = [bytearray()]

    def _hash(self, block: bytes | memoryview) -> bytes:
        hasher = self._salted.copy()
        hasher.update(block)
        missing = self._block_size - len(block)
        if missing:
            hasher.update(bytes(missing))
        return hasher.digest()

    def add(self, data: bytes) -> None:
        pending = self._levels[0]
        pending += data
        full = len(pending) - len(pending) % self._block_size
        with memoryview(pending) as view:
            hashes = [self._hash(view[i : i + self._block_size]) for i in range(0, full, self._block_size)]
        del pending[:full]
        for digest in hashes:
            self._push(1, digest)

    def _push(self, level: int, digest: bytes) -> None:
        if level == len(self._levels):
            self._levels.append(bytearray())
        block = self._levels[level]
        if len(block) == self._block_size:
            parent = self._hash(bytes(block))
            block.clear()
            self._push(level + 1, parent)
        self._levels[level] += digest

    def root(self) -> bytes:
        """Finish the tree: the hash of its topmost block, or zeros for an empty file."""
        if self._levels[0]:
            last = self._hash(bytes(self._levels[0]))
            self._levels[0].clear()
            self._push(1, last)
        if len(self._levels) == 1:
            return b""
        level = 1
        while level < len(self._levels) - 1:
            digest = self._hash(bytes(self._levels[level]))
            self._levels[level].clear()
            self._push(level + 1, digest)
            level += 1
        top = bytes(self._levels[-1])
        digest_size = self._salted.digest_size
        # A file of one block has no tree: its root hash is that block's hash.
        return top if len(top) == digest_size else self._hash(top)
