"""Making hash trees: the root hash alone, or all of the tree as veritysetup writes it."""

import os
import uuid
from contextlib import closing

from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity.parameters import Parameters
from ipe_emu.integrity.dm_verity.superblock import Superblock
from ipe_emu.integrity.hash_workers import Progress, hash_file, no_progress
from ipe_emu.integrity.merkle import BlockWriter, TreeBuilder, nothing_written

_WRITE_BYTES = 1 << 20


def size_of(fd: int) -> int:
    """Return the bytes of an open file or block device; moves its offset."""
    return os.lseek(fd, 0, os.SEEK_END)


def check_data_size(fd: int, parameters: Parameters) -> None:
    """Raise UserError if the data is not all there."""
    size = size_of(fd)
    if size < parameters.data_size:
        raise UserError(
            f"number of data blocks is {parameters.data_blocks}, {parameters.data_size} bytes with blocks of"
            f" {parameters.data_block_size}; the image has {size} bytes"
        )


def compute_root_hash(
    fd: int,
    parameters: Parameters,
    *,
    jobs: int = 1,
    progress: Progress = no_progress,
    write: BlockWriter = nothing_written,
) -> bytes:
    """Return the root hash of the data in the open file ``fd``, whatever a tree that exists may say.

    ``jobs`` processes share the work. ``write`` is told of each block of the tree. Raises UserError if the image is too
    short, OSError as pread(2).
    """
    check_data_size(fd, parameters)
    builder = TreeBuilder(parameters.shape, parameters.tree_hasher().hash_block, write)
    digests = hash_file(fd, parameters.data_hasher(), parameters.data_blocks, jobs=jobs, progress=progress)
    with closing(digests):
        for digest in digests:
            builder.add(digest.slots, digest.repeat)
    return builder.root()[: parameters.digest_size]


def format_image(
    data_fd: int,
    hash_fd: int,
    parameters: Parameters,
    hash_offset: int,
    *,
    identity: uuid.UUID | None,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> bytes:
    """Write the hash area of ``data_fd`` to ``hash_fd`` from ``hash_offset`` on, and return the root hash.

    With ``identity``, a superblock comes first. The two may be the same file, where data and hash area do not overlap
    (UserError). Otherwise as ``compute_root_hash``; OSError also as pwrite(2).
    """
    tree_offset = parameters.tree_offset(hash_offset, superblock=identity is not None)
    if os.path.sameopenfile(data_fd, hash_fd) and min(hash_offset, tree_offset) < parameters.data_size:
        raise UserError(
            f"hash offset is {hash_offset}, and the hash area would overlap data of {parameters.data_size} bytes"
        )
    offsets = parameters.level_offsets(tree_offset)

    def write(level: int, first: int, block: bytes, repeat: int) -> None:
        position = offsets[level] + first * len(block)
        at_once = max(1, _WRITE_BYTES // len(block))
        while repeat:
            count = min(repeat, at_once)
            pwrite_all(hash_fd, block * count, position)
            position += count * len(block)
            repeat -= count

    root_hash = compute_root_hash(data_fd, parameters, jobs=jobs, progress=progress, write=write)
    if identity is not None:
        pwrite_all(hash_fd, Superblock(parameters, identity).pack(), hash_offset)
    end = tree_offset + parameters.tree_size
    if size_of(hash_fd) < end:  # a superblock and no tree: a single data block has none
        os.ftruncate(hash_fd, end)
    return root_hash


def pwrite_all(fd: int, data: bytes, position: int) -> None:
    """Write all of ``data``; OSError as pwrite(2)."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, position)
        position += written
        rest = rest[written:]
