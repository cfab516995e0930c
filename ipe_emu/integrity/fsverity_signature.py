"""Builtin fs-verity signatures: PKCS#7, detached, over struct fsverity_formatted_digest.

Source: Documentation/filesystems/fsverity.rst, "Built-in signature verification".
"""

import errno
import struct

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.fsverity import HASH_ALGORITHMS, MAX_SIGNATURE_SIZE
from ipe_emu.keyring import Keyrings
from ipe_emu.pkcs7 import verify_pkcs7_signature


def formatted_digest(digest: Digest) -> bytes:
    """Return what a builtin signature is over: ``FSVerity``, the algorithm's number, the digest's size and value."""
    return struct.pack("<8sHH", b"FSVerity", HASH_ALGORITHMS[digest.algorithm], len(digest.value)) + digest.value


def verify_signature(
    digest: Digest,
    signature: bytes,
    keyrings: Keyrings,
    *,
    unavailable_hashes: frozenset[str] = frozenset(),
) -> None:
    """Raise KernelError unless a key of the keyring ``.fs-verity`` has signed the digest.

    EMSGSIZE for a signature that does not fit into a descriptor, ENOKEY while the keyring is empty, else as
    ``verify_pkcs7_signature``. Source: ``fsverity_verify_signature`` (fs/verity/signature.c).
    """
    if len(signature) > MAX_SIGNATURE_SIZE:
        reason = f"the signature has {len(signature)} bytes, and {MAX_SIGNATURE_SIZE} is the most"
        raise KernelError(errno.EMSGSIZE, reason, "enable_verity")
    if not keyrings.fsverity:
        raise KernelError(
            errno.ENOKEY, "the fs-verity keyring is empty, and the file is signed", "fsverity_verify_signature"
        )
    own = keyrings.alone(keyrings.fsverity)  # the platform's is not asked
    verify_pkcs7_signature(signature, own, content=formatted_digest(digest), unavailable_hashes=unavailable_hashes)
