"""The parameters of a dm-verity target, as device-mapper tables give them.

Source: Documentation/admin-guide/device-mapper/verity.rst, "Construction Parameters".
"""

import re

from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.integrity.facts import Digest

#: Has its argument behind it: the key whose payload is the root hash's signature.
_SIGNATURE_KEY = "root_hash_sig_key_desc"
_FIELDS = 10
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+", re.ASCII)


@frozen
class VerityTable:
    """What matters of them here. A target with a signature key was only made because the signature was good."""

    root_hash: Digest
    signature_key: str | None = None

    @classmethod
    def parse(cls, parameters: str) -> "VerityTable":
        """Parse what TABLE_STATUS gives for a target; UserError naming the field that is wrong."""
        words = parameters.split()
        if len(words) < _FIELDS:
            raise UserError(f"dm-verity table: {len(words)} fields; it has {_FIELDS} at least")
        algorithm, digest = words[7:9]
        if not _HEX.fullmatch(digest):
            raise UserError(f"dm-verity table: the digest is {digest[:140]!r}; it is pairs of hexadecimal digits")
        options = words[_FIELDS + 1 :]
        count = words[_FIELDS] if len(words) > _FIELDS else "0"
        if not count.isascii() or not count.isdigit() or int(count) != len(options):
            raise UserError(f"dm-verity table: {len(options)} optional words follow where it says {count[:20]!r}")
        return cls(Digest(algorithm, bytes.fromhex(digest)), _behind(_SIGNATURE_KEY, options))


def _behind(name: str, options: list[str]) -> str | None:
    if name not in options:
        return None
    index = options.index(name) + 1
    if index == len(options):
        raise UserError(f"dm-verity table: {name} has no argument")
    return options[index]
