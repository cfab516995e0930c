"""Hash algorithms by the names of the kernel's crypto API, as dm-verity tables and IPE policies give them."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from ipe_emu.errors import UserError

#: The kernel's name: hashlib's name, and the digest's size in bytes where that is a parameter.
ALGORITHMS: Mapping[str, tuple[str, int | None]] = MappingProxyType(
    {
        **{name: (name, None) for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sm3")},
        **{f"sha3-{bits}": (f"sha3_{bits}", None) for bits in (224, 256, 384, 512)},
        **{f"blake2b-{bits}": ("blake2b", bits // 8) for bits in (160, 256, 384, 512)},
        **{f"blake2s-{bits}": ("blake2s", bits // 8) for bits in (128, 160, 224, 256)},
        "rmd160": ("ripemd160", None),
    }
)

#: Other programs' names for the same; a kernel knows none of them.
_OTHER_NAMES = {"blake2b512": "blake2b-512", "blake2s256": "blake2s-256", "ripemd160": "rmd160"}


def find(name: str) -> tuple[str, int | None]:
    """Return hashlib's name for the kernel's ``name``, and the digest size to ask for (None: it has but one).

    Raises UserError for a name no kernel has, and for an algorithm that this Python was built without.
    """
    try:
        constructor, size = ALGORITHMS[name]
    except KeyError:
        meant = _OTHER_NAMES.get(name) or (name.lower() if name.lower() in ALGORITHMS else None)
        hint = f"; a kernel calls it {meant!r}" if meant else f"; known are {', '.join(ALGORITHMS)}"
        raise UserError(f"hash algorithm is {name!r}, which no kernel has{hint}") from None
    try:
        hashlib.new(constructor)
    except ValueError:
        raise UserError(f"hash algorithm is {name!r}, which this Python does not have") from None
    return constructor, size


def digest_size(name: str) -> int:
    """Return the bytes of a digest of the algorithm ``name``; UserError as ``find``."""
    constructor, size = find(name)
    return hashlib.new(constructor).digest_size if size is None else size
