"""An image that dm-verity protects, opened: what the emulator serves of it, and what IPE knows of its files."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.dm_verity import CorruptedError, DmVerity, Parameters, Superblock, parse_root_hash
from ipe_emu.integrity.dm_verity.tree import size_of
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.integrity.hash_workers import Progress, no_progress
from ipe_emu.keyring import Keyrings
from ipe_emu.profiles import Profile
from ipe_emu.volumes.ext4_seals import SealedFiles
from ipe_emu.volumes.opening import open_image
from ipe_emu.volumes.programs import HIDES_ERRORS
from ipe_emu.volumes.recognise import Kind, check_mountable, recognise
from ipe_emu.volumes.specification import TreeOptions, VolumeSpecification

_SIGNATURE_LIMIT: Final = 1 << 20
#: What a kernel's pages have on the machines that are emulated; data blocks of dm-verity are no larger.
PAGE_SIZE: Final = 4096


@define(eq=False)
class VerifiedImage:
    """What is to be read of a volume: every block is verified when it is read, in whatever thread.

    ``on_corruption`` is told of each read that fails, as a kernel's log is.
    """

    specification: VolumeSpecification
    verity: DmVerity
    kind: Kind
    signed: bool = False
    seals: SealedFiles | None = field(default=None, init=False)
    on_corruption: Callable[[str], None] = field(default=lambda _: None)

    @property
    def size(self) -> int:
        """Bytes of data, as the mapped device has."""
        return self.verity.parameters.data_size

    @property
    def hides_errors(self) -> bool:
        """Whether who reads it through its program is not told that a block is corrupted."""
        return self.kind in HIDES_ERRORS

    @property
    def facts(self) -> Facts:
        """What holds for every file of it."""
        digest = Digest(self.verity.parameters.algorithm, self.verity.root_hash)
        return Facts(dmverity_roothash=digest, dmverity_signature=self.signed)

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, all verified. CorruptedError (EIO) if one block of them is not."""
        try:
            return self.verity.read(offset, length)
        except CorruptedError as error:
            self.on_corruption(f"{self.specification.image}: {error.reason}")
            raise

    def verify(self, *, jobs: int = 1, progress: Progress = no_progress) -> None:
        """Check all of it. UserError names the first bad block."""
        try:
            self.verity.verify(jobs=jobs, progress=progress)
        except KernelError as error:
            raise UserError(f"{self.specification.image}: {error.reason}") from None

    def find_seals(self) -> None:
        """Look for the files that fs-verity has sealed in it, and check them all: what mounts it here would not.

        UserError for a file that a kernel could not open, or not read all of. NotJudgedError as `SealedFiles.find`.
        """
        if self.kind is not Kind.EXT4:
            return
        try:
            seals = SealedFiles.find(self.read, self.size)
            seals.check()
        except KernelError as error:
            raise UserError(
                f"{self.specification.image}: {error.reason} (a kernel answers {error.name} to whoever uses this file;"
                " what mounts ext4 here would not)"
            ) from None
        self.seals = seals

    def verify_signature(self, keyrings: Keyrings, profile: Profile) -> None:
        """Check the signature of the root hash, if there is one (``verity_verify_root_hash()``).

        UserError if it is not good: a kernel makes no such device.
        """
        path = self.specification.signature
        if path is None:
            return
        from ipe_emu.integrity.dm_verity.signature import verify_root_hash  # noqa: PLC0415 - cryptography is slow

        signature = _content_of(path)
        try:
            verify_root_hash(self.verity.root_hash, signature, keyrings, unavailable_hashes=profile.unavailable_hashes)
        except KernelError as error:
            raise UserError(
                f"{path}: signature of the root hash of {self.specification.image}: {error.reason} (the kernel makes"
                f" no such volume: {error.name})"
            ) from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        self.signed = True


def open_verified(specification: VolumeSpecification) -> VerifiedImage:
    """Open a volume's images, for as long as this process lives.

    UserError, which names the file and what is wrong with it: images that are too short or whose superblock lies, a
    root hash that is not theirs, a file system that cannot be mounted. Whether blocks beyond the first are good shows
    when they are read.
    """
    data_fd = open_image(specification.image)
    hash_path = specification.hash_image or specification.image
    hash_fd = data_fd if specification.hash_image is None else open_image(specification.hash_image)
    parameters, tree_offset = _tree(specification, data_fd, hash_fd)
    try:
        root_hash = parse_root_hash(specification.root_hash, parameters.algorithm)
        verity = DmVerity(parameters, root_hash, data_fd, hash_fd, tree_offset)
    except UserError as error:
        raise UserError(f"{specification.image} with the hash tree in {hash_path}: {error}") from None
    try:
        kind = _file_system(verity)
    except KernelError as error:
        raise UserError(
            f"{specification.image}: cannot be mounted: {error.reason} (the kernel answers {error.name})"
        ) from None
    except UserError as error:
        raise UserError(f"{specification.image}: {error}") from None
    return VerifiedImage(specification, verity, kind)


def _tree(specification: VolumeSpecification, data_fd: int, hash_fd: int) -> tuple[Parameters, int]:
    """Return what the hash tree is made of, and where it begins."""
    offset = specification.hash_offset
    if specification.tree is None:
        path = specification.hash_image or specification.image
        try:
            parameters = Superblock.read(hash_fd, offset).parameters
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return parameters, parameters.tree_offset(offset, superblock=True)
    try:
        parameters = _parameters(specification.tree, data_fd)
        return parameters, parameters.tree_offset(offset, superblock=False)
    except UserError as error:
        raise UserError(f"{specification.image}: {error}") from None


def _file_system(verity: DmVerity) -> Kind:
    parameters = verity.parameters
    if parameters.data_block_size > PAGE_SIZE:
        raise KernelError(errno.EINVAL, f"data blocks of {parameters.data_block_size} bytes", "verity_ctr")
    kind = recognise(verity.read, parameters.data_size)
    check_mountable(kind, verity.read, parameters.data_size, parameters.data_block_size)
    return kind


def _parameters(tree: TreeOptions, data_fd: int) -> Parameters:
    blocks = tree.data_blocks or (size_of(data_fd) // tree.data_block_size if tree.data_block_size > 0 else 0)
    return Parameters(blocks, tree.algorithm, tree.hash_type, tree.data_block_size, tree.hash_block_size, tree.salt)


def _content_of(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_SIGNATURE_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(content) > _SIGNATURE_LIMIT:
        raise UserError(f"{path}: larger than {_SIGNATURE_LIMIT} bytes, and no signature")
    return content
