"""The fs-verity digest of a file's content (Documentation/filesystems/fsverity.rst, "File digest computation")."""

import errno
import hashlib
import os
import struct
from collections.abc import Callable
from contextlib import closing

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.hash_workers import Progress, hash_file, no_progress
from ipe_emu.integrity.merkle import Shape, TreeBuilder

#: The hash algorithms fs-verity knows, with their numbers in struct fsverity_descriptor.
HASH_ALGORITHMS = {"sha256": 1, "sha512": 2}
DEFAULT_BLOCK_SIZE = 4096
#: Bytes. A kernel takes those up to the size of its pages, and of its file system's blocks.
BLOCK_SIZES = tuple(1024 << power for power in range(7))
MAX_SALT_SIZE = 32
_MAX_LEVELS = 8

#: Asks the kernel for the digest of a sealed file: the algorithm's number and the digest; OSError as the ioctl.
MeasureVerity = Callable[[int], tuple[int, bytes]]


def measure(
    fd: int,
    algorithm: str,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    salt: bytes = b"",
    jobs: int = 1,
    progress: Progress = no_progress,
) -> Digest:
    """Compute the digest that FS_IOC_MEASURE_VERITY would give for the open file ``fd``, without sealing it.

    ``block_size`` is bytes, one of ``BLOCK_SIZES``; ``salt`` at most 32 bytes; ``jobs`` processes share the work.
    KernelError EINVAL for an algorithm that fs-verity does not have, EFBIG for a file that is too large for these
    parameters, EIO for one that is cut meanwhile; UserError for other wrong parameters; OSError as pread(2). Memory is
    bounded whatever the file's size. Moves the file's offset.
    """
    if algorithm not in HASH_ALGORITHMS:
        raise KernelError(errno.EINVAL, f"fs-verity has no hash algorithm {algorithm!r}", "fsverity_get_hash_alg")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"block size is {block_size}; it is a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}")
    if len(salt) > MAX_SALT_SIZE:
        raise UserError(f"salt has {len(salt)} bytes; it has {MAX_SALT_SIZE} at most")
    size = os.fstat(fd).st_size
    root = _root_hash(fd, size, algorithm, block_size, salt, jobs, progress) if size else b""
    # struct fsverity_descriptor: version, hash_algorithm, log_blocksize, salt_size, sig_size, data_size,
    # root_hash[64], salt[32], reserved[144].
    descriptor = struct.pack(
        "<BBBBIQ64s32s144x",
        1, HASH_ALGORITHMS[algorithm], block_size.bit_length() - 1, len(salt), 0, size, root, salt,
    )  # fmt: skip
    return Digest(algorithm, hashlib.new(algorithm, descriptor).digest())


def _root_hash(
    fd: int, size: int, algorithm: str, block_size: int, salt: bytes, jobs: int, progress: Progress
) -> bytes:
    unsalted = hashlib.new(algorithm)
    # The salt is padded with zeros to the hash function's own block size.
    prefix = salt + bytes(-len(salt) % unsalted.block_size)
    hasher = BlockHasher(algorithm, None, block_size, unsalted.digest_size, prefix, b"")
    shape = Shape(block_size, unsalted.digest_size, block_size // unsalted.digest_size)
    if len(shape.level_sizes(-(-size // block_size))) > _MAX_LEVELS:
        raise KernelError(
            errno.EFBIG,
            f"the file's {size} bytes need more than {_MAX_LEVELS} levels",
            "fsverity_init_merkle_tree_params",
        )
    builder = TreeBuilder(shape, hasher.hash_block)
    whole, tail = divmod(size, block_size)
    with closing(hash_file(fd, hasher, whole, jobs=jobs, progress=progress)) as digests:
        for digest in digests:
            builder.add(digest.slots, digest.repeat)
    if tail:
        builder.add(hasher.hash_block(_read_tail(fd, whole * block_size, tail) + bytes(block_size - tail)))
        progress(tail)
    return builder.root()


def _read_tail(fd: int, offset: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise KernelError(errno.EIO, "it became shorter while it was read", "pread")
        data += more
    return data


def sealed_digest(fd: int, measure_verity: MeasureVerity) -> Digest | None:
    """Return the digest that the kernel vouches for, None if the file is not sealed or its file system cannot seal.

    KernelError EINVAL for an algorithm that is not known here; OSError as the ioctl for all other faults.
    """
    try:
        number, value = measure_verity(fd)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP}:
            return None
        raise
    for name, known in HASH_ALGORITHMS.items():
        if number == known:
            return Digest(name, value)
    raise KernelError(
        errno.EINVAL, f"the file is sealed with the hash algorithm number {number}", "fsverity_ioctl_measure"
    )
