"""Signed policies: SignedData as the kernel parses, verifies and trusts it.

``verify_pkcs7_signature`` is what IPE calls; ``parse_signed_data`` looks into a message without judging it.
Signing is in ``ipe_emu.pkcs7.sign``, which needs much more of ``cryptography`` and is imported on its own.
"""

from ipe_emu.pkcs7.signed_data import MAX_SIZE, SignedData, parse_signed_data
from ipe_emu.pkcs7.verify import verify_pkcs7_signature

__all__ = ["MAX_SIZE", "SignedData", "parse_signed_data", "verify_pkcs7_signature"]
