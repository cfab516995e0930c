"""What an ext4 image keeps of its inodes: which are sealed by fs-verity, and what lies behind the end of their content.

No call of user space tells either, and the program that mounts ext4 here shows neither. Only what that takes is read:
superblock, group descriptors, inode tables and extents (Documentation/filesystems/ext4). The image may be hostile:
every number is checked against the image's size, and what is read of it in all does not exceed that by much.
"""

import errno
import stat
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Final, NoReturn

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.volumes.crc32c import crc32c
from ipe_emu.volumes.recognise import Read

VERITY_FL: Final = 0x100000
_ENCRYPT_FL: Final = 0x800
_EA_INODE_FL: Final = 0x200000
_EXTENTS_FL: Final = 0x80000
_INLINE_DATA_FL: Final = 0x10000000
ROOT_INODE: Final = 2

_SUPERBLOCK_AT: Final = 1024
_SUPERBLOCK_SIZE: Final = 1024
# s_mtime, s_mnt_count, s_feature_ro_compat, s_checksum.
_MOUNT_TIME: Final = slice(0x2C, 0x30)
_MOUNT_COUNT: Final = slice(0x34, 0x36)
_RO_COMPAT: Final = slice(0x64, 0x68)
_CHECKSUM: Final = slice(0x3FC, 0x400)
_OLD_INODE_SIZE: Final = 128
_OLD_BLOCK_SIZE: Final = 1024
# struct ext4_super_block: s_inodes_count, s_blocks_count_lo, s_first_data_block, s_log_block_size, s_blocks_per_group,
# s_inodes_per_group, s_rev_level, s_inode_size, s_feature_compat, s_feature_incompat, s_feature_ro_compat, s_uuid,
# s_desc_size, s_first_meta_bg, s_blocks_count_hi, s_backup_bgs, s_checksum_seed.
_SUPERBLOCK: Final = struct.Struct("<II12xII4xI4xI32xI8xH2xIII16s134xH4xI72xI248x8s28xI")
# struct ext4_group_desc: bg_inode_table_lo, bg_flags, bg_itable_unused_lo; and the high halves of both numbers.
_GROUP: Final = struct.Struct("<8xI6xH8xH2x")
_GROUP_HIGH: Final = struct.Struct("<40xI6xH")
_GROUP_SIZE: Final = 32
# struct ext4_inode: i_mode, i_size_lo, i_flags, i_block, i_generation, i_file_acl_lo, i_size_high, i_file_acl_high.
_INODE: Final = struct.Struct("<H2xI24xI4x60sIII6xH")
#: The least i_extra_isize of an inode with i_checksum_hi.
_EXTRA_WITH_CHECKSUM: Final = 4
_LINKS_AND_FLAGS: Final = "<26xH4xI"
# struct ext4_extent_header: eh_magic, eh_entries, eh_max, eh_depth.
_EXTENT_HEADER: Final = struct.Struct("<HHHH4x")
# struct ext4_extent: ee_block, ee_len, ee_start_hi, ee_start_lo; and struct ext4_extent_idx: ei_block, ei_leaf_lo,
# ei_leaf_hi.
_EXTENT: Final = struct.Struct("<IHHI")
_EXTENT_INDEX: Final = struct.Struct("<IIH2x")
_EXTENT_MAGIC: Final = 0xF30A
_MOST_LEVELS: Final = 5
#: EXT_INIT_MAX_LEN: a longer extent is one that was never written, and reads as zeros.
_LONGEST_WRITTEN: Final = 0x8000

_COMPAT_SPARSE_SUPER2: Final = 0x200
_INCOMPAT_META_BG: Final = 0x10
_INCOMPAT_64BIT: Final = 0x80
_INCOMPAT_CSUM_SEED: Final = 0x2000
_RO_COMPAT_SPARSE_SUPER: Final = 0x1
_RO_COMPAT_GDT_CSUM: Final = 0x10
_RO_COMPAT_METADATA_CSUM: Final = 0x400
_RO_COMPAT_VERITY: Final = 0x8000
_INODE_UNINIT: Final = 1

_AT_ONCE: Final = 1 << 20
#: No file that is not made to exhaust memory is in so many pieces.
_MOST_EXTENTS: Final = 1 << 20


def _corrupted(inode: int, reason: str, function: str) -> KernelError:
    return KernelError(errno.EUCLEAN, f"inode {inode}: {reason}", function)


@frozen
class Extent:
    """``count`` blocks of a file from its block ``first`` on, which lie on the device from ``start`` on."""

    first: int
    count: int
    start: int
    is_written: bool


@frozen
class Inode:
    """A file's inode; ``size`` is bytes, ``seed`` where checksums of its extents begin (None: they have none).

    ``fault`` is what a kernel finds wrong in it.
    """

    number: int
    size: int
    flags: int
    block: bytes
    seed: int | None
    fault: KernelError | None


def set_up_superblock(read: Read, write: Callable[[int, bytes], int]) -> None:
    """Change the superblock as a mount for writing does (``ext4_setup_super()``): it counts, and has its time."""
    superblock = bytearray(read(_SUPERBLOCK_AT, _SUPERBLOCK_SIZE))
    count = int.from_bytes(superblock[_MOUNT_COUNT], "little") + 1 & 0xFFFF
    superblock[_MOUNT_COUNT] = count.to_bytes(2, "little")
    superblock[_MOUNT_TIME] = (int(time.time()) & 0xFFFFFFFF).to_bytes(4, "little")
    if int.from_bytes(superblock[_RO_COMPAT], "little") & _RO_COMPAT_METADATA_CSUM:
        superblock[_CHECKSUM] = crc32c(0xFFFFFFFF, bytes(superblock[: _CHECKSUM.start])).to_bytes(4, "little")
    write(_SUPERBLOCK_AT, bytes(superblock))


@define(eq=False)
class Ext4:
    """An ext4 file system in the first ``size`` bytes of what ``read`` reads, which a kernel would mount.

    That is, `recognise.check_mountable` has passed it. NotJudgedError for one whose superblock lies.
    """

    read: Read
    size: int
    has_verity: bool = field(init=False)
    block_size: int = field(init=False)
    blocks: int = field(init=False)
    _inodes: int = field(init=False)
    _inodes_per_group: int = field(init=False)
    _inode_size: int = field(init=False)
    _has_64bit: bool = field(init=False)
    _first_block: int = field(init=False)
    _blocks_per_group: int = field(init=False)
    _first_meta_group: int | None = field(init=False)
    #: The groups with a copy of the superblock that does not go by their numbers; None if all have one.
    _backups: tuple[int, ...] | None = field(init=False)
    _descriptor_size: int = field(init=False)
    _has_unused_inodes: bool = field(init=False)
    _checksum_seed: int | None = field(init=False)
    #: How many blocks may still be read: each belongs to one file at most.
    _budget: int = field(init=False)
    #: Numbers of inodes that are in use, as far as the groups say: first and last of each group.
    _used: list[range] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        (
            self._inodes, blocks, self._first_block, log_block_size, self._blocks_per_group, self._inodes_per_group,
            revision, inode_size, compatible, incompatible, read_only, uuid, descriptor_size, first_meta_group,
            blocks_high, backups, seed,
        ) = _SUPERBLOCK.unpack(self.exactly(_SUPERBLOCK_AT, _SUPERBLOCK.size))  # fmt: skip
        self.has_verity = bool(read_only & _RO_COMPAT_VERITY)
        self.block_size = _OLD_BLOCK_SIZE << min(log_block_size, 6)
        self._has_64bit = bool(incompatible & _INCOMPAT_64BIT)
        self.blocks = blocks | (blocks_high << 32 if self._has_64bit else 0)
        self._budget = self.blocks
        self._inode_size = inode_size if revision else _OLD_INODE_SIZE
        self._descriptor_size = descriptor_size if self._has_64bit else _GROUP_SIZE
        self._has_unused_inodes = bool(read_only & (_RO_COMPAT_GDT_CSUM | _RO_COMPAT_METADATA_CSUM))
        self._checksum_seed = None
        if read_only & _RO_COMPAT_METADATA_CSUM:
            self._checksum_seed = seed if incompatible & _INCOMPAT_CSUM_SEED else crc32c(0xFFFFFFFF, uuid)
        self._first_meta_group = first_meta_group if incompatible & _INCOMPAT_META_BG else None
        self._backups = None
        if compatible & _COMPAT_SPARSE_SUPER2:
            self._backups = struct.unpack("<II", backups)
        elif read_only & _RO_COMPAT_SPARSE_SUPER:
            self._backups = ()
        self._check()

    def _check(self) -> None:
        """Refuse what no kernel mounts (``ext4_load_super()``), and what it would take too long to look through."""
        known = {
            "inode size": (self._inode_size, _OLD_INODE_SIZE <= self._inode_size <= self.block_size),
            "size of group descriptors": (
                self._descriptor_size,
                _GROUP_SIZE <= self._descriptor_size <= _OLD_BLOCK_SIZE and self._descriptor_size.bit_count() == 1,
            ),
            "inodes per group": (
                self._inodes_per_group,
                self.block_size <= self._inodes_per_group * self._inode_size <= 8 * self.block_size * self._inode_size,
            ),
            "number of inodes": (self._inodes, self._inodes * self._inode_size <= self.size),
            "number of blocks": (self.blocks, self.blocks * self.block_size <= self.size),
        }
        for name, (value, is_possible) in known.items():
            if not is_possible:
                raise NotJudgedError(f"which files of the ext4 image are sealed is not known: its {name} is {value}")

    def exactly(self, offset: int, length: int) -> bytes:
        """Read of the image; KernelError EIO where it cannot be read, or ends before."""
        data = self.read(offset, length) if offset + length <= self.size else b""
        if len(data) != length:
            raise KernelError(errno.EIO, f"the ext4 image ends before byte {offset + length}", "sb_bread")
        return data

    def _spend(self, inode: Inode, blocks: int) -> None:
        self._budget -= blocks
        if self._budget < 0:
            raise NotJudgedError(f"the ext4 image has blocks that belong to several files, as inode {inode.number} has")

    # -- inodes -------------------------------------------------------------------------------------------------------

    def sealed(self) -> Iterator[Inode]:
        """Yield the inode of every sealed file. KernelError for inode tables that cannot be read."""
        self._used.clear()
        links_and_flags = struct.Struct(f"{_LINKS_AND_FLAGS}{self._inode_size - 36}x")
        per_piece = _AT_ONCE // self._inode_size
        for group in range(-(-self._inodes // self._inodes_per_group)):
            table, used = self._group(group)
            first = group * self._inodes_per_group + 1
            self._used.append(range(first, first + used))
            for start in range(0, used, per_piece):
                length = min(per_piece, used - start) * self._inode_size
                piece = self.exactly(table + start * self._inode_size, length)
                if not piece.strip(b"\0"):
                    continue
                for index, (links, flags) in enumerate(links_and_flags.iter_unpack(piece)):
                    if flags & VERITY_FL and links:
                        at = index * self._inode_size
                        yield self._inode(first + start + index, piece[at : at + self._inode_size])

    def is_known(self, number: int) -> bool:
        """Whether ``sealed`` has looked at the inode: it is in the part of its group's table that is in use."""
        group = (number - 1) // self._inodes_per_group
        return 0 <= group < len(self._used) and number in self._used[group]

    def _group(self, group: int) -> tuple[int, int]:
        """Return where the inode table of a group is, and how many inodes of it are in use."""
        block, index = divmod(group, self.block_size // self._descriptor_size)
        at = self._descriptor_block(block) * self.block_size + index * self._descriptor_size
        descriptor = self.exactly(at, self._descriptor_size)
        table, flags, unused = _GROUP.unpack_from(descriptor)
        if len(descriptor) >= 2 * _GROUP_SIZE:
            table_high, unused_high = _GROUP_HIGH.unpack_from(descriptor)
            table, unused = table | table_high << 32, unused | unused_high << 16
        count = min(self._inodes_per_group, self._inodes - group * self._inodes_per_group)
        if self._has_unused_inodes:
            # What is behind was never zeroed (lazy_itable_init), and no directory leads there.
            count = 0 if flags & _INODE_UNINIT else min(count, max(0, self._inodes_per_group - unused))
        return table * self.block_size, count

    def _descriptor_block(self, number: int) -> int:
        """Return which block holds the group descriptors' block of this number (``descriptor_loc()``)."""
        superblock = _SUPERBLOCK_AT // self.block_size
        if self._first_meta_group is None or number < self._first_meta_group:
            return superblock + number + 1
        group = number * (self.block_size // self._descriptor_size)
        # ext4_bg_has_super(): of the groups that come here, only the first is one of 0, 1 and odd numbers.
        has_superblock = group == 0 or self._backups is None or group in self._backups
        is_shifted = group == 0 and self.block_size == _OLD_BLOCK_SIZE and self._first_block == 0
        return self._first_block + group * self._blocks_per_group + has_superblock + is_shifted

    def _inode(self, number: int, data: bytes) -> Inode:
        mode, size, flags, block, generation, attributes, size_high, attributes_high = _INODE.unpack_from(data)
        seed = None
        if self._checksum_seed is not None:
            seed = crc32c(crc32c(self._checksum_seed, struct.pack("<I", number)), struct.pack("<I", generation))
        fault = None
        extra = int.from_bytes(data[_OLD_INODE_SIZE : _OLD_INODE_SIZE + 2], "little")
        attributes |= attributes_high << 32 if self._has_64bit else 0
        if _OLD_INODE_SIZE + extra > self._inode_size > _OLD_INODE_SIZE or extra & 3:
            fault = KernelError(errno.EUCLEAN, f"inode {number}: iget: bad extra_isize {extra}", "__ext4_iget")
        elif seed is not None and not _has_checksum(data, seed):
            fault = KernelError(errno.EBADMSG, f"inode {number}: iget: checksum invalid", "__ext4_iget")
        elif size_high >= 1 << 31 or not stat.S_ISREG(mode) or flags & _EA_INODE_FL:
            fault = _corrupted(number, f"iget: no regular file (mode {mode:o}, flags {flags:#x})", "__ext4_iget")
        elif attributes and not self._first_block < attributes < self.blocks:
            fault = _corrupted(number, f"iget: bad extended attribute block {attributes}", "__ext4_iget")
        return Inode(number, size | size_high << 32, flags, block, seed, fault)

    # -- extents ------------------------------------------------------------------------------------------------------

    def open(self, inode: Inode) -> "File":
        """Return the blocks of a sealed file. KernelError as a kernel answers to opening one that is broken."""
        if inode.flags & _ENCRYPT_FL:
            raise NotJudgedError(f"inode {inode.number} of the ext4 image is sealed and encrypted")
        if inode.fault is not None:
            raise inode.fault
        if not inode.flags & _EXTENTS_FL or inode.flags & _INLINE_DATA_FL:
            raise _corrupted(inode.number, "verity file doesn't use extents", "ext4_get_verity_descriptor_location")
        extents = tuple(islice(self._extents(inode, inode.block, None, 0), _MOST_EXTENTS + 1))
        if len(extents) > _MOST_EXTENTS:
            raise NotJudgedError(f"inode {inode.number} of the ext4 image is sealed, and in more than a million pieces")
        position = 0
        for extent in extents:
            if extent.first < position:
                self._bad(inode, "extents that overlap, or in the wrong order")
            position = extent.first + extent.count
        return File(self, inode, extents)

    def _extents(self, inode: Inode, node: bytes, depth: int | None, first: int) -> Iterator[Extent]:
        """Yield the extents of a node of the tree, whose root has no ``depth`` to have (``__ext4_ext_check()``)."""
        magic, entries, most, level = _EXTENT_HEADER.unpack_from(node)
        room = (len(node) - _EXTENT_HEADER.size) // _EXTENT.size
        if magic != _EXTENT_MAGIC or not 0 < most <= room or entries > most or level > _MOST_LEVELS:
            self._bad(inode, f"an extent header {node[:8].hex()}")
        if depth is not None and level != depth:
            self._bad(inode, f"an extent node of depth {level} in the place of one of {depth}")
        if level and not entries:
            self._bad(inode, "an index of extents that is empty")
        end = _EXTENT_HEADER.size + entries * _EXTENT.size
        found = [*map(_index if level else _extent, range(_EXTENT_HEADER.size, end, _EXTENT.size), repeat(node))]
        if depth is not None and found and found[0].first != first:
            self._bad(inode, "an extent node that begins elsewhere than its index says")
        position = 0
        for extent in found:
            if extent.first < position:
                self._bad(inode, "extents that overlap, or in the wrong order")
            if not extent.count or extent.start <= self._first_block or extent.start + extent.count > self.blocks:
                self._bad(inode, f"an extent of {extent.count} blocks from {extent.start} on")
            self._spend(inode, extent.count)
            position = extent.first + extent.count
        if depth is not None and inode.seed is not None:
            # struct ext4_extent_tail (ext4_extent_block_csum_verify())
            at = _EXTENT_HEADER.size + most * _EXTENT.size
            if at + 4 > len(node) or crc32c(inode.seed, node[:at]) != int.from_bytes(node[at : at + 4], "little"):
                reason = f"inode {inode.number}: an extent node with a bad checksum"
                raise KernelError(errno.EBADMSG, reason, "__ext4_ext_check")
        if not level:
            yield from found
            return
        for index in found:
            below = self.exactly(index.start * self.block_size, self.block_size)
            yield from self._extents(inode, below, level - 1, index.first)

    @staticmethod
    def _bad(inode: Inode, what: str) -> NoReturn:
        raise _corrupted(inode.number, what, "__ext4_ext_check")


def _extent(at: int, node: bytes) -> Extent:
    """Read a struct ext4_extent."""
    first, length, high, low = _EXTENT.unpack_from(node, at)
    count = length if length <= _LONGEST_WRITTEN else length - _LONGEST_WRITTEN
    return Extent(first, count, low | high << 32, length <= _LONGEST_WRITTEN)


def _index(at: int, node: bytes) -> Extent:
    """Read a struct ext4_extent_idx: an extent of one block, which is the node below."""
    first, low, high = _EXTENT_INDEX.unpack_from(node, at)
    return Extent(first, 1, low | high << 32, is_written=True)


def _has_checksum(inode: bytes, seed: int) -> bool:
    """Check l_i_checksum_lo and, where there is room for it, i_checksum_hi (``ext4_inode_csum_verify()``)."""
    fields = [slice(0x7C, 0x7E)]
    if len(inode) > _OLD_INODE_SIZE and int.from_bytes(inode[0x80:0x82], "little") >= _EXTRA_WITH_CHECKSUM:
        fields.append(slice(0x82, 0x84))
    cleared = bytearray(inode)
    stored = b""
    for place in fields:
        stored += inode[place]
        cleared[place] = bytes(2)
    return crc32c(seed, bytes(cleared)) & (1 << 8 * len(stored)) - 1 == int.from_bytes(stored, "little")


def _first(extent: Extent) -> int:
    return extent.first


@frozen
class File:
    """A file's blocks, in order. What is in no extent reads as zeros."""

    file_system: Ext4
    inode: Inode
    extents: tuple[Extent, ...]

    @property
    def end(self) -> int:
        """Where its last extent ends, in bytes; 0 if it has none."""
        last = self.extents[-1] if self.extents else Extent(0, 0, 0, is_written=False)
        return (last.first + last.count) * self.file_system.block_size

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a range of the file into runs: the length of each, and where it is in the image, -1 for zeros."""
        size = self.file_system.block_size
        position = begin
        before = bisect_right(self.extents, begin // size, key=_first)
        for extent in islice(self.extents, max(0, before - 1), None):
            if extent.first * size >= end:
                break
            first, last = max(position, extent.first * size), min(end, (extent.first + extent.count) * size)
            if last <= first:
                continue
            if first > position:
                yield first - position, -1
            yield last - first, extent.start * size + first - extent.first * size if extent.is_written else -1
            position = last
        if position < end:
            yield end - position, -1

    def read(self, offset: int, length: int) -> bytes:
        """Read a part of it, whatever its size says. KernelError where the image cannot be read."""
        return b"".join(
            bytes(count) if at < 0 else self.file_system.exactly(at, count)
            for count, at in self.runs(offset, offset + length)
        )
