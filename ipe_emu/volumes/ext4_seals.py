"""The files of an ext4 image that are sealed by fs-verity (fs/ext4/verity.c).

Behind the end of its content, from the next multiple of 64 KiB on, such a file has its Merkle tree, then, in whole
blocks, its struct fsverity_descriptor with the builtin signature; the last four bytes of its last block are their size.
A kernel reads the descriptor when the file is opened, and verifies what it reads of the content. The program that
mounts the image here does neither, and so all of it is done at once. That the superblock has the feature verity matters
to the ioctls alone: a kernel heeds the flag of the inode (``ext4_set_inode_flags()``).
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import MAX_DESCRIPTOR_SIZE, StoredDescriptor, check_content, tree_levels
from ipe_emu.integrity.seals import Seal
from ipe_emu.integrity.sources import OpenFile, Place
from ipe_emu.volumes.ext4 import ROOT_INODE, Ext4, File, Inode
from ipe_emu.volumes.recognise import Read

_METADATA_ALIGNMENT: Final = 65536
_SIZE_BYTES: Final = 4
_INT_MAX: Final = 0x7FFFFFFF
_PAGE_SIZE: Final = 4096
_AT_ONCE: Final = 1 << 20
#: So many sealed files can be kept in mind.
_MOST_FILES: Final = 200_000


@frozen
class SealedFile:
    """A sealed file: its size in bytes, and its seal.

    ``fault`` is what a kernel finds instead when the file is opened, ``damage`` what it finds when all of it is read.
    """

    size: int
    seal: Seal | None = None
    fault: KernelError | None = None
    damage: KernelError | None = None

    @classmethod
    def read(cls, file_system: Ext4, inode: Inode) -> "SealedFile":
        """Read its seal, and all of its content."""
        try:
            file = file_system.open(inode)
            stored = _stored(file)
        except KernelError as error:
            return cls(inode.size, fault=error)
        damage = None
        try:
            _check(file, stored)
        except KernelError as error:
            damage = error
        return cls(inode.size, Seal(stored.parameters, stored.descriptor, stored.signature), damage=damage)


@frozen(eq=False)
class SealedFiles:
    """Those of one image, by inode."""

    file_system: Ext4
    by_inode: Mapping[int, SealedFile]

    @classmethod
    def find(cls, read: Read, size: int) -> "SealedFiles":
        """Look for them in an image that `recognise.check_mountable` has passed as ext4, and check each.

        NotJudgedError where it cannot be known which there are; KernelError where the image cannot be read.
        """
        file_system = Ext4(read, size)
        found: dict[int, SealedFile] = {}
        for inode in file_system.sealed():
            if len(found) == _MOST_FILES:
                raise NotJudgedError(f"the ext4 image has more than {_MOST_FILES} sealed files")
            found[inode.number] = SealedFile.read(file_system, inode)
        return cls(file_system, found)

    def check(self) -> None:
        """Raise KernelError for the first file that a kernel could not open, or not read all of."""
        for number, sealed in self.by_inode.items():
            error = sealed.fault or sealed.damage
            if error is not None:
                raise KernelError(error.errno, f"inode {number}, sealed by fs-verity: {error.reason}", error.function)

    def check_numbers(self, root: int) -> None:
        """Raise NotJudgedError unless the mounted image, whose root has this number, shows the numbers of inodes."""
        if root != ROOT_INODE:
            raise NotJudgedError("which files of the ext4 image are sealed cannot be told: inodes have other numbers")

    def of(self, st: os.stat_result) -> Seal | None:
        """Return the seal of a file of the mounted image, None if it has none.

        KernelError as open(2) of a file whose seal is broken; NotJudgedError for one that was not looked at, or that
        a kernel could not read all of.
        """
        sealed = self.by_inode.get(st.st_ino)
        if sealed is None:
            if not self.file_system.is_known(st.st_ino):
                raise NotJudgedError(f"inode {st.st_ino} of the ext4 image is in none of its tables' used parts")
            return None
        if sealed.fault is not None:
            raise KernelError(sealed.fault.errno, sealed.fault.reason, sealed.fault.function)
        if sealed.damage is not None:
            raise NotJudgedError(f"inode {st.st_ino} of the ext4 image, sealed by fs-verity: {sealed.damage}")
        if sealed.size != st.st_size:
            raise NotJudgedError(f"inode {st.st_ino} of the ext4 image has {sealed.size} bytes and shows {st.st_size}")
        return sealed.seal


def _stored(file: File) -> StoredDescriptor:
    """Read a file's descriptor. KernelError as open(2)."""
    stored = StoredDescriptor.parse(_descriptor(file), file.inode.size)
    # fsverity_init_merkle_tree_params(): neither larger than a page, nor than the file system's blocks.
    if stored.parameters.block_size > min(_PAGE_SIZE, file.file_system.block_size):
        reason = f"Merkle tree blocks of {stored.parameters.block_size} bytes"
        raise KernelError(errno.EINVAL, reason, "fsverity_init_merkle_tree_params")
    tree_levels(file.inode.size, stored.parameters)
    return stored


def _check(file: File, stored: StoredDescriptor) -> None:
    """Check all of a file's content, and all of its tree. KernelError EIO as read(2)."""
    base = _metadata_position(file.inode.size)
    blocks = _blocks(file, stored.parameters.block_size)
    check_content(stored, file.inode.size, blocks, lambda offset, length: file.read(base + offset, length))


def _metadata_position(size: int) -> int:
    """Where the Merkle tree begins (``ext4_verity_metadata_pos()``)."""
    return -(-size // _METADATA_ALIGNMENT) * _METADATA_ALIGNMENT


def _descriptor(file: File) -> bytes:
    """Read the descriptor, as far as it says (``ext4_get_verity_descriptor()``)."""
    size_at = file.end - _SIZE_BYTES
    if size_at < 0:
        raise _no_descriptor(file, "it has no extents")
    size = int.from_bytes(file.read(size_at, _SIZE_BYTES), "little")
    begin = (size_at - size) // file.file_system.block_size * file.file_system.block_size
    if size > _INT_MAX or size > size_at or begin < _metadata_position(file.inode.size):
        raise _no_descriptor(file, f"a descriptor of {size} bytes before byte {size_at}")
    return file.read(begin, min(size, MAX_DESCRIPTOR_SIZE + 1))


def _no_descriptor(file: File, why: str) -> KernelError:
    reason = f"inode {file.inode.number}: verity file corrupted; can't find descriptor: {why}"
    return KernelError(errno.EUCLEAN, reason, "ext4_get_verity_descriptor_location")


def _blocks(file: File, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the blocks of the content, of ``size`` bytes, each with the number of times that it comes.

    What stands in the last page behind the end counts as it does when a kernel reads that page: within a block of the
    content it is hashed with it, and behind that it must be zeros.
    """
    end = -(-file.inode.size // size) * size
    for length, at in file.runs(0, end):
        if at < 0:
            yield bytes(size), length // size
            continue
        for offset in range(0, length, _AT_ONCE):
            piece = file.file_system.exactly(at + offset, min(_AT_ONCE, length - offset))
            for start in range(0, len(piece), size):
                yield piece[start : start + size], 1
    if any(file.read(end, -end % _PAGE_SIZE)):
        raise KernelError(errno.EIO, "FILE CORRUPTED: data past EOF is not zeroed", "verify_data_block")


@define(eq=False)
class ImageSeals:
    """A source of facts (``sources.FactsSource``): the seals in mounted images, by their device (``major:minor``).

    ``verify`` raises KernelError unless the emulated machine's keyring ``.fs-verity`` verifies the builtin signature of
    a digest.
    """

    verify: Callable[[Digest, bytes], None]
    #: Called before a seal is believed; raises NotJudgedError if what it was read from is another by now.
    recheck: Callable[[str, SealedFiles], None] = field(default=lambda *_: None)
    by_device: dict[str, SealedFiles] = field(factory=dict, init=False)
    #: Those that a kernel would have mounted for writing, and which are read-only here.
    for_writing: set[str] = field(factory=set, init=False)

    def of(self, place: Place | None, st: os.stat_result) -> Seal | None:
        """Return the seal of a file; see `SealedFiles.of`. NotJudgedError where it was there and is not any more."""
        found = self.image_of(place)
        if place is None or found is None:
            return None
        self.recheck(place.device, found)
        return found.of(st)

    def image_of(self, place: Place | None) -> SealedFiles | None:
        """Return what is sealed in the image that a file lies on; None if it lies on no mounted ext4 image."""
        return None if place is None else self.by_device.get(place.device)

    def is_for_writing(self, place: Place | None) -> bool:
        """Whether a kernel would have mounted what a file lies on for writing."""
        return place is not None and place.device in self.for_writing

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:  # noqa: ARG002 - protocol
        """Return what holds for a file. KernelError as open(2) of one whose signature, or seal, is not good."""
        seal = self.of(place, st)
        if seal is None:
            return NO_FACTS
        if seal.signature:
            self.verify(seal.digest, seal.signature)
        return seal.facts
