"""The superblock of a hash area (cryptsetup, DMVerity: "verity superblock format"): 512 bytes, little-endian."""

import os
import struct
import uuid

from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity.parameters import MAX_SALT_SIZE, SUPERBLOCK_SIZE, Parameters, check_hash_offset

_SIGNATURE = b"verity\0\0"
_VERSION = 1
# signature, version, hash type, UUID, algorithm, data block size, hash block size, data blocks, salt size, reserved,
# salt, reserved.
_FORMAT = struct.Struct("<8sII16s32sIIQH6s256s168s")


@frozen
class Superblock:
    """What an image remembers of its hash tree. The root hash is not in it, nor is it protected by that."""

    parameters: Parameters
    uuid: uuid.UUID

    @classmethod
    def read(cls, hash_fd: int, offset: int) -> "Superblock":
        """Read the superblock at an offset of an open hash image. UserError as ``parse``, or for the offset."""
        check_hash_offset(offset)
        return cls.parse(os.pread(hash_fd, SUPERBLOCK_SIZE, offset))

    @classmethod
    def parse(cls, data: bytes) -> "Superblock":
        """Read a superblock. UserError names the field that is wrong, and the value found.

        Stricter than veritysetup in one thing: what is reserved or unused must be zero, as all tools write it.
        """
        if len(data) < SUPERBLOCK_SIZE:
            raise UserError(f"no superblock: {len(data)} bytes are there, and it has {SUPERBLOCK_SIZE}")
        fields = _FORMAT.unpack_from(data)
        signature, version, hash_type, identity, algorithm, data_block_size, hash_block_size, data_blocks = fields[:8]
        salt_size, reserved, salt, reserved_behind = fields[8:]
        if signature != _SIGNATURE:
            raise UserError(f"no superblock: signature is {signature!r}, not {_SIGNATURE!r}")
        if version != _VERSION:
            raise UserError(f"superblock: version is {version}; known is {_VERSION}")
        name, _, behind_name = algorithm.partition(b"\0")
        if len(name) == len(algorithm):
            raise UserError(f"superblock: algorithm is {algorithm!r}, a name without end")
        if salt_size > MAX_SALT_SIZE:
            raise UserError(f"superblock: salt size is {salt_size}; it is {MAX_SALT_SIZE} bytes at most")
        unused = {
            "algorithm": behind_name,
            "salt": salt[salt_size:],
            "salt size": reserved,
            "all fields": reserved_behind,
        }
        for where, rest in unused.items():
            if any(rest):
                raise UserError(f"superblock: unused bytes behind {where} are {rest.hex()}, not zero")
        try:
            parameters = Parameters(
                data_blocks, name.decode("latin-1"), hash_type, data_block_size, hash_block_size, salt[:salt_size]
            )
        except UserError as error:
            raise UserError(f"superblock: {error}") from None
        return cls(parameters, uuid.UUID(bytes=identity))

    def pack(self) -> bytes:
        """Return the bytes of the superblock."""
        p = self.parameters
        return _FORMAT.pack(
            _SIGNATURE, _VERSION, p.hash_type, self.uuid.bytes, p.algorithm.encode(), p.data_block_size,
            p.hash_block_size, p.data_blocks, len(p.salt), b"", p.salt, b"",
        )  # fmt: skip
