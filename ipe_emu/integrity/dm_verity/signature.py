"""Signed root hashes: PKCS#7, detached, over the hash as lower-case hexadecimal text without newline."""

import errno

from ipe_emu.errors import KernelError
from ipe_emu.keyring import Keyrings
from ipe_emu.pkcs7 import verify_pkcs7_signature

#: A signature travels as the payload of a key of type "user", which holds no more (``user_preparse``).
MAX_SIGNATURE_SIZE = 32767


def verify_root_hash(
    root_hash: bytes,
    signature: bytes,
    keyrings: Keyrings,
    *,
    unavailable_hashes: frozenset[str] = frozenset(),
) -> None:
    """Raise KernelError unless a trusted key has signed the root hash; see `verify_root_hash_text`."""
    verify_root_hash_text(root_hash.hex().encode(), signature, keyrings, unavailable_hashes=unavailable_hashes)


def verify_root_hash_text(
    text: bytes,
    signature: bytes,
    keyrings: Keyrings,
    *,
    unavailable_hashes: frozenset[str] = frozenset(),
) -> None:
    """Raise KernelError unless a trusted key has signed a root hash as a table has it (``verity_verify_root_hash``).

    In capitals it is another text. The keyring ``.dm-verity`` is asked after all others. For the errors see
    ``verify_pkcs7_signature``; of a signature no key can carry, EINVAL.
    """
    if not 0 < len(signature) <= MAX_SIGNATURE_SIZE:
        raise KernelError(
            errno.EINVAL,
            f"the signature has {len(signature)} bytes; a key carries from 1 to {MAX_SIGNATURE_SIZE}",
            "user_preparse",
        )
    try:
        trusted = keyrings.for_root_hashes()
        verify_pkcs7_signature(signature, trusted, content=text, unavailable_hashes=unavailable_hashes)
    except KernelError as error:
        # An empty keyring is not asked, so that kernels without such keys answer as those without such a keyring.
        if not keyrings.dm_verity or error.errno not in {errno.ENOKEY, errno.EKEYREJECTED}:
            raise
        own = keyrings.alone(keyrings.dm_verity)
        verify_pkcs7_signature(signature, own, content=text, unavailable_hashes=unavailable_hashes)
