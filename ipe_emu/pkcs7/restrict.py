"""Who may vouch for a certificate that is to enter a keyring (kernel: crypto/asymmetric_keys/restrict.c)."""

import errno
from typing import TYPE_CHECKING

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7.signature import public_key_verify_signature
from ipe_emu.pkcs7.trust import find_asymmetric_key
from ipe_emu.pkcs7.x509 import Certificate

if TYPE_CHECKING:
    from ipe_emu.keyring import Keyring, Keyrings


def restrict_link_by_signature(certificate: Certificate, keyrings: "Keyrings", where: "tuple[Keyring, ...]") -> None:
    """Return if a key in ``where`` has signed the certificate.

    Raises KernelError: ENOKEY if none is found that could have, ENOPKG without the hash that was signed, else as
    ``public_key_verify_signature``.
    """
    if certificate.signature.digest is None:
        raise KernelError(
            errno.ENOPKG, "signed with a hash that this kernel does not have", "restrict_link_by_signature"
        )
    issuer = _issuer(certificate, keyrings, where)
    if issuer is None:
        reason = f"no key of the trusted keyrings has signed the certificate {certificate.readable_name!r}"
        raise KernelError(errno.ENOKEY, reason, "restrict_link_by_signature")
    public_key_verify_signature(issuer.public_key, certificate.signature)


def _issuer(certificate: Certificate, keyrings: "Keyrings", where: "tuple[Keyring, ...]") -> Certificate | None:
    if certificate.authority_id is None and certificate.authority_skid is None:
        named = (key for keyring in where for key in keyring.certificates if key.subject == certificate.issuer)
        return next((key for key in named if not keyrings.is_blacklisted(key)), None)
    try:
        return find_asymmetric_key(keyrings, where, certificate.authority_id, certificate.authority_skid)
    except KernelError:
        return None  # one that disagrees with itself is none
