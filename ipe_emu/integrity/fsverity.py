"""The fs-verity digest of a file's content (Documentation/filesystems/fsverity.rst, "File digest computation")."""

import errno
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from attrs import frozen

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.hash_workers import Progress, hash_file, no_progress
from ipe_emu.integrity.merkle import BlockWriter, Shape, TreeBuilder, nothing_written

#: The file systems that keep seals. FUSE passes the ioctls on to whoever serves it, for whom nobody vouches.
FILE_SYSTEMS = frozenset({"btrfs", "ext4", "f2fs"})
#: The hash algorithms fs-verity knows, with their numbers in struct fsverity_descriptor.
HASH_ALGORITHMS = {"sha256": 1, "sha512": 2}
DEFAULT_BLOCK_SIZE = 4096
#: Bytes. A kernel takes those up to the size of its pages, and of its file system's blocks.
BLOCK_SIZES = tuple(1024 << power for power in range(7))
MAX_SALT_SIZE = 32
#: Bytes of a descriptor with its builtin signature (``FS_VERITY_MAX_DESCRIPTOR_SIZE``), and what it leaves for that.
MAX_DESCRIPTOR_SIZE = 16384
MAX_SIGNATURE_SIZE = 16128
_MAX_LEVELS = 8
# struct fsverity_descriptor: version, hash_algorithm, log_blocksize, salt_size, sig_size, data_size, root_hash, salt,
# __reserved.
_DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144s")
_SIGNATURE_SIZE_AT = 4

#: Asks the kernel for the digest of a sealed file: the algorithm's number and the digest; OSError as the ioctl.
MeasureVerity = Callable[[int], tuple[int, bytes]]
#: Reads of a stored Merkle tree: offset and length, in bytes.
ReadTree = Callable[[int, int], bytes]


@frozen
class Parameters:
    """What a digest depends on besides the content: ``block_size`` is bytes, ``salt`` at most 32 bytes."""

    algorithm: str = "sha256"
    block_size: int = DEFAULT_BLOCK_SIZE
    salt: bytes = b""


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

    ``block_size`` is bytes, one of ``BLOCK_SIZES``; ``jobs`` processes share the work. Errors as ``descriptor``.
    """
    parameters = Parameters(algorithm, block_size, salt)
    return file_digest(algorithm, descriptor(fd, parameters, jobs=jobs, progress=progress))


def file_digest(algorithm: str, descriptor: bytes) -> Digest:
    """Return the digest of a file with this descriptor (``fsverity_compute_file_digest()``)."""
    return Digest(algorithm, hashlib.new(algorithm, descriptor).digest())


def descriptor(fd: int, parameters: Parameters, *, jobs: int = 1, progress: Progress = no_progress) -> bytes:
    """Compute struct fsverity_descriptor of the open file ``fd``, without a signature.

    KernelError EINVAL for an algorithm that fs-verity does not have, EFBIG for a file that is too large for these
    parameters, EIO for one that is cut meanwhile; UserError for other wrong parameters; OSError as pread(2). Memory is
    bounded whatever the file's size. Moves the file's offset.
    """
    algorithm, block_size, salt = parameters.algorithm, parameters.block_size, parameters.salt
    if algorithm not in HASH_ALGORITHMS:
        raise KernelError(errno.EINVAL, f"fs-verity has no hash algorithm {algorithm!r}", "fsverity_get_hash_alg")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"block size is {block_size}; it is a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}")
    if len(salt) > MAX_SALT_SIZE:
        raise UserError(f"salt has {len(salt)} bytes; it has {MAX_SALT_SIZE} at most")
    size = os.fstat(fd).st_size
    root = _tree(fd, size, parameters, jobs=jobs, progress=progress).root() if size else b""
    return _DESCRIPTOR.pack(
        1, HASH_ALGORITHMS[algorithm], block_size.bit_length() - 1, len(salt), 0, size, root, salt, b""
    )


@frozen
class StoredDescriptor:
    """What a file system keeps of a seal: ``descriptor`` as ``descriptor()`` makes it, and the builtin signature.

    ``root_hash`` is what the Merkle tree of a file that is not empty must have.
    """

    parameters: Parameters
    descriptor: bytes
    root_hash: bytes
    signature: bytes

    @classmethod
    def parse(cls, stored: bytes, size: int) -> "StoredDescriptor":
        """Read struct fsverity_descriptor of a file of ``size`` bytes, with the signature behind it.

        KernelError EMSGSIZE for one of no possible size, EINVAL where a kernel does not understand it
        (``validate_fsverity_descriptor()``), and for parameters that none has (``fsverity_init_merkle_tree_params()``).
        """
        if not _DESCRIPTOR.size <= len(stored) <= MAX_DESCRIPTOR_SIZE:
            reason = f"a verity descriptor of {len(stored)} bytes"
            raise KernelError(errno.EMSGSIZE, reason, "fsverity_get_descriptor")
        version, number, log_block_size, salt_size, signature_size, data_size, root, salt, reserved = (
            _DESCRIPTOR.unpack_from(stored)
        )
        if version != 1:
            raise _invalid(f"unrecognized descriptor version: {version}")
        if any(reserved):
            raise _invalid("reserved bits set in descriptor")
        if salt_size > MAX_SALT_SIZE:
            raise _invalid(f"invalid salt_size: {salt_size}")
        if data_size != size:
            raise _invalid(f"wrong data_size: {data_size} (desc) != {size} (inode)")
        if signature_size > len(stored) - _DESCRIPTOR.size:
            raise _invalid("signature overflows verity descriptor")
        algorithm = next((name for name, known in HASH_ALGORITHMS.items() if known == number), None)
        if algorithm is None:
            raise KernelError(errno.EINVAL, f"hash algorithm number {number}", "fsverity_get_hash_alg")
        if 1 << min(log_block_size, 63) not in BLOCK_SIZES:
            reason = f"blocks of 2^{log_block_size} bytes"
            raise KernelError(errno.EINVAL, reason, "fsverity_init_merkle_tree_params")
        # What is hashed is the descriptor as it is stored, but for this field (fsverity_compute_file_digest()).
        unsigned = stored[:_SIGNATURE_SIZE_AT] + bytes(4) + stored[_SIGNATURE_SIZE_AT + 4 : _DESCRIPTOR.size]
        return cls(
            Parameters(algorithm, 1 << log_block_size, salt[:salt_size]),
            unsigned,
            root[: hashlib.new(algorithm).digest_size],
            stored[_DESCRIPTOR.size : _DESCRIPTOR.size + signature_size],
        )


def _invalid(reason: str) -> KernelError:
    return KernelError(errno.EINVAL, reason, "validate_fsverity_descriptor")


def tree_levels(size: int, parameters: Parameters) -> tuple[int, ...]:
    """The number of blocks of every level of a file's Merkle tree, from the one above the data up.

    KernelError EFBIG for a file that is too large for these parameters.
    """
    levels = _shape(parameters).level_sizes(-(-size // parameters.block_size))
    if len(levels) > _MAX_LEVELS:
        raise KernelError(
            errno.EFBIG,
            f"the file's {size} bytes need more than {_MAX_LEVELS} levels",
            "fsverity_init_merkle_tree_params",
        )
    return levels


def read_tree(fd: int, parameters: Parameters, offset: int, length: int) -> bytes:
    """Return a piece of the Merkle tree as FS_IOC_READ_VERITY_METADATA gives it: the root's block first.

    The whole file is hashed for it. Errors as ``descriptor``.
    """
    size, block_size = os.fstat(fd).st_size, parameters.block_size
    levels = tree_levels(size, parameters)
    first_block = _first_blocks(levels)
    end = min(offset + length, sum(levels) * block_size)
    piece = bytearray(max(end - offset, 0))

    def keep(level: int, first: int, block: bytes, repeat: int) -> None:
        start = (first_block[level] + first) * block_size
        position, stop = max(start, offset), min(start + repeat * block_size, end)
        while position < stop:
            within = (position - start) % block_size
            taken = min(block_size - within, stop - position)
            piece[position - offset : position - offset + taken] = block[within : within + taken]
            position += taken

    if piece:
        _tree(fd, size, parameters, write=keep).root()
    return bytes(piece)


def _shape(parameters: Parameters) -> Shape:
    digest_size = hashlib.new(parameters.algorithm).digest_size
    return Shape(parameters.block_size, digest_size, parameters.block_size // digest_size)


def _hasher(parameters: Parameters) -> BlockHasher:
    unsalted = hashlib.new(parameters.algorithm)
    # The salt is padded with zeros to the hash function's own block size.
    prefix = parameters.salt + bytes(-len(parameters.salt) % unsalted.block_size)
    return BlockHasher(parameters.algorithm, None, parameters.block_size, unsalted.digest_size, prefix, b"")


def check_content(stored: StoredDescriptor, size: int, blocks: Iterable[tuple[bytes, int]], read: ReadTree) -> None:
    """Check all of a file's content against its stored Merkle tree, and that against the root hash.

    ``blocks`` are those of the content, each with the number of times that it comes; ``read`` reads of the stored tree.
    KernelError EIO for what a kernel finds when it reads there (``verify_data_block()``), EFBIG as ``tree_levels``.
    """
    parameters = stored.parameters
    block_size = parameters.block_size
    first_block = _first_blocks(tree_levels(size, parameters))

    def compare(level: int, first: int, block: bytes, repeat: int) -> None:
        for index in range(first, first + repeat):
            if read((first_block[level] + index) * block_size, block_size) != block:
                raise _corrupted(f"block {index} of level {level} of the Merkle tree")

    hasher = _hasher(parameters)
    builder = TreeBuilder(_shape(parameters), hasher.hash_block, compare)
    for block, repeat in blocks:
        builder.add(hasher.hash_block(block), repeat)
    if size and builder.root() != stored.root_hash:
        raise _corrupted("the root hash")


def _corrupted(what: str) -> KernelError:
    return KernelError(errno.EIO, f"FILE CORRUPTED: {what} is not that of its content", "verify_data_block")


def _first_blocks(levels: Sequence[int]) -> list[int]:
    """Return which block of the whole tree is the first of each level: the root comes first."""
    return [sum(levels[level + 1 :]) for level in range(len(levels))]


def _tree(
    fd: int,
    size: int,
    parameters: Parameters,
    *,
    jobs: int = 1,
    progress: Progress = no_progress,
    write: BlockWriter = nothing_written,
) -> TreeBuilder:
    tree_levels(size, parameters)
    block_size = parameters.block_size
    hasher = _hasher(parameters)
    builder = TreeBuilder(_shape(parameters), hasher.hash_block, write)
    whole, tail = divmod(size, block_size)
    with closing(hash_file(fd, hasher, whole, jobs=jobs, progress=progress)) as digests:
        for digest in digests:
            builder.add(digest.slots, digest.repeat)
    if tail:
        builder.add(hasher.hash_block(_read_tail(fd, whole * block_size, tail) + bytes(block_size - tail)))
        progress(tail)
    return builder


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
