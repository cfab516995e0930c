"""dm-verity: images with a hash tree, as veritysetup makes them and the kernel checks them.

``parameters`` says what a tree is made of, ``superblock`` how an image remembers it, ``tree`` makes trees, ``volume``
checks images against theirs, block by block or as a whole. ``signature`` checks signed root hashes; it is imported on
its own, because cryptography is slow to import.
"""

from ipe_emu.integrity.dm_verity.blocks import CorruptedError, VerifiedBlocks
from ipe_emu.integrity.dm_verity.parameters import Parameters, parse_root_hash
from ipe_emu.integrity.dm_verity.superblock import Superblock
from ipe_emu.integrity.dm_verity.tree import compute_root_hash, format_image
from ipe_emu.integrity.dm_verity.volume import DmVerity

__all__ = [
    "CorruptedError",
    "DmVerity",
    "Parameters",
    "Superblock",
    "VerifiedBlocks",
    "compute_root_hash",
    "format_image",
    "parse_root_hash",
]
