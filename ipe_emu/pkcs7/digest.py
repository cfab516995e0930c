"""Message digests by the kernel's names, and what is done where one is missing."""

import errno
import hashlib

from ipe_emu.errors import KernelError


class UnavailableError(Exception):
    """The kernel being emulated has no such hash (``crypto_alloc_shash`` finds nothing)."""


def compute(name: str, data: bytes, unavailable: frozenset[str]) -> bytes:
    """Return the digest of ``data``.

    Raises UnavailableError where the emulated kernel lacks the hash, so that the caller does what the
    kernel does then (it may go on), and ``KernelError(ENOPKG)`` where only this Python lacks it:
    what cannot be computed here must not pass.
    """
    if name in unavailable:
        raise UnavailableError(name)
    try:
        return hashlib.new(name.replace("-", "_"), data, usedforsecurity=False).digest()
    except ValueError:
        raise KernelError(
            errno.ENOPKG,
            f"this Python has no {name}, so a signature over it is refused here, whatever a kernel would say",
            "crypto_alloc_shash",
        ) from None
