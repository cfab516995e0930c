"""What a dm-verity hash tree is made of (Documentation/admin-guide/device-mapper/verity.rst; cryptsetup, DMVerity)."""

import re

from attrs import field, frozen

from ipe_emu.errors import UserError
from ipe_emu.integrity import algorithms
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.merkle import Shape

#: Bytes. veritysetup makes all of these; a kernel maps data blocks up to the size of its pages only.
BLOCK_SIZES = tuple(512 << power for power in range(11))
MAX_SALT_SIZE = 256
#: Hash areas begin at a multiple of this many bytes.
SECTOR = 512
SUPERBLOCK_SIZE = 512
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)


@frozen
class Parameters:
    """What a tree is made of. UserError names the field that is wrong, and the value found.

    ``data_blocks`` is how many blocks of ``data_block_size`` bytes are hashed; ``algorithm`` the kernel's name.
    ``hash_type`` 1 puts ``salt`` before a block and pads digests to a power of two; 0, Chrome OS's first, puts it
    behind and packs digests.
    """

    data_blocks: int = field()
    algorithm: str = field(default="sha256")
    hash_type: int = field(default=1)
    data_block_size: int = field(default=4096)
    hash_block_size: int = field(default=4096)
    salt: bytes = field(default=b"", repr=bytes.hex)

    def __attrs_post_init__(self) -> None:
        algorithms.find(self.algorithm)
        if self.hash_type not in {0, 1}:
            raise UserError(f"hash type is {self.hash_type}; dm-verity has 0 and 1")
        for name, size in (("data", self.data_block_size), ("hash", self.hash_block_size)):
            if size not in BLOCK_SIZES:
                smallest, largest = BLOCK_SIZES[0], BLOCK_SIZES[-1]
                raise UserError(f"{name} block size is {size}; it is a power of two from {smallest} to {largest}")
        if len(self.salt) > MAX_SALT_SIZE:
            raise UserError(f"salt size is {len(self.salt)}; it is {MAX_SALT_SIZE} bytes at most")
        if not 0 < self.data_blocks < 1 << 64:
            raise UserError(f"number of data blocks is {self.data_blocks}; there is at least one")
        if self.data_size >= 1 << 63:
            raise UserError(
                f"number of data blocks is {self.data_blocks}, which with blocks of {self.data_block_size} bytes no"
                " device has"
            )

    @property
    def digest_size(self) -> int:
        """Bytes of a digest."""
        return algorithms.digest_size(self.algorithm)

    @property
    def data_size(self) -> int:
        """Bytes of data that are hashed."""
        return self.data_blocks * self.data_block_size

    @property
    def shape(self) -> Shape:
        """How digests lie in hash blocks (``verity_ctr``: hash_per_block_bits)."""
        # As many as a power of two that fit, whether or not digests are padded to one.
        per_block = 1 << (self.hash_block_size // self.digest_size).bit_length() - 1
        slot_size = self.hash_block_size // per_block if self.hash_type else self.digest_size
        return Shape(self.hash_block_size, slot_size, per_block)

    @property
    def tree_size(self) -> int:
        """Bytes of the hash tree, all levels."""
        return sum(self.shape.level_sizes(self.data_blocks)) * self.hash_block_size

    def tree_offset(self, hash_offset: int, *, superblock: bool) -> int:
        """Return the byte where the tree begins, for a hash area at ``hash_offset``.

        It is a multiple of the hash block size: the next one behind the superblock; where there is none the one at or
        *before* the offset, because veritysetup hands a block number on. UserError for an offset that is no multiple
        of 512.
        """
        check_hash_offset(hash_offset)
        if not superblock:
            return hash_offset // self.hash_block_size * self.hash_block_size
        return -(-(hash_offset + SUPERBLOCK_SIZE) // self.hash_block_size) * self.hash_block_size

    def level_offsets(self, tree_offset: int) -> tuple[int, ...]:
        """Return the byte where each level begins, from level 0 up; on the device the topmost comes first."""
        offsets: list[int] = []
        position = tree_offset
        for size in reversed(self.shape.level_sizes(self.data_blocks)):
            offsets.insert(0, position)
            position += size * self.hash_block_size
        return tuple(offsets)

    def data_hasher(self) -> BlockHasher:
        """What hashes data blocks."""
        return self._hasher(self.data_block_size)

    def tree_hasher(self) -> BlockHasher:
        """What hashes blocks of the tree."""
        return self._hasher(self.hash_block_size)

    def _hasher(self, block_size: int) -> BlockHasher:
        prefix, suffix = (self.salt, b"") if self.hash_type else (b"", self.salt)
        constructor, size = algorithms.find(self.algorithm)
        return BlockHasher(constructor, size, block_size, self.shape.slot_size, prefix, suffix)


def check_hash_offset(offset: int) -> None:
    """Raise UserError for an offset of a hash area that is no multiple of 512, or beyond what a file can have."""
    if offset % SECTOR or not 0 <= offset < 1 << 62:
        raise UserError(f"hash offset is {offset}; it is a multiple of {SECTOR} bytes, and not behind all files")


def parse_root_hash(text: str, algorithm: str) -> bytes:
    """Return the root hash that ``text`` says, ``HEX`` or ``ALGORITHM:HEX`` in lower case.

    Lower case alone, because that is the text a signature is over. UserError for all else: another algorithm than
    the tree's, a wrong length, other characters.
    """
    named, colon, digits = text.rpartition(":")
    if colon and named != algorithm:
        raise UserError(f"root hash is {text!r}, and the hash tree is made with {algorithm}")
    if digits != digits.lower() and _HEX.fullmatch(digits.lower()):
        raise UserError(f"root hash is {text!r}; it is written in lower case: {digits.lower()}")
    if not _HEX.fullmatch(digits):
        raise UserError(f"root hash is {text!r}, which is not hexadecimal")
    wanted = algorithms.digest_size(algorithm) * 2
    if len(digits) != wanted:
        raise UserError(f"root hash is {text!r}: {len(digits)} digits, and {algorithm} has {wanted}")
    return bytes.fromhex(digits)
