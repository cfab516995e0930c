"""The mutable state of one verification, and the question whether a chain ends in a trusted key."""

import errno
from typing import TYPE_CHECKING

from attrs import define, field

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7.signature import Signature, public_key_verify_signature
from ipe_emu.pkcs7.signed_data import SignerInfo
from ipe_emu.pkcs7.x509 import Certificate

if TYPE_CHECKING:
    from ipe_emu.keyring import Keyring, Keyrings


@define(eq=False)
class Embedded:
    """A certificate of the message and what has been found out about it."""

    certificate: Certificate
    blacklisted: bool
    signer: "Embedded | None" = None
    """The embedded certificate whose key is known to have signed this one; itself at a self-signed root."""
    seen: bool = False
    verified: bool = False


@define(eq=False)
class Signer:
    """A SignerInfo and what has been found out about it (kernel: ``struct pkcs7_signed_info``)."""

    info: SignerInfo
    signature: Signature
    certificate: Embedded | None = None
    unsupported_crypto: bool = False
    blacklisted: bool = False


@define(eq=False)
class Message:
    """A message under verification."""

    certificates: list[Embedded]
    signers: list[Signer] = field(factory=list)
    by_id: dict[bytes, Embedded] = field(factory=dict, init=False)
    """The first certificate with each serial number and issuer."""
    by_skid: dict[bytes, Embedded] = field(factory=dict, init=False)
    """The first certificate with each subject key identifier."""

    def __attrs_post_init__(self) -> None:
        for embedded in self.certificates:
            self.by_id.setdefault(embedded.certificate.id, embedded)
            if embedded.certificate.skid is not None:
                self.by_skid.setdefault(embedded.certificate.skid, embedded)

    def forget_seen(self) -> None:
        """Start another walk over the certificates."""
        for embedded in self.certificates:
            embedded.seen = False


def validate_trust(message: Message, keyrings: "Keyrings", where: "tuple[Keyring, ...]") -> None:
    """Return if a signer's chain meets a key in ``where``; raise KernelError if not.

    EKEYREJECTED: a key is known and the signature is not its own, whatever the other signers are worth.
    ENOKEY: no key is known; ENOPKG: nor could one be, for lack of a hash. EINVAL: an empty identifier.
    Source: ``pkcs7_validate_trust``.
    """
    # Only `seen` is cleared. `verified` outlives a walk, so that what was found out with the revocation list,
    # if that ended in a fault, counts for the trusted keys too.
    message.forget_seen()
    trusted = False
    answer: KernelError | None = None
    for signer in message.signers:
        try:
            _validate_one(signer, keyrings, where)
        except KernelError as error:
            if error.errno not in {errno.ENOKEY, errno.ENOPKG}:
                raise
            if answer is None or (answer.errno, error.errno) == (errno.ENOKEY, errno.ENOPKG):
                answer = error
        else:
            trusted = True
    if answer is not None and not trusted:
        raise answer


def _validate_one(signer: Signer, keyrings: "Keyrings", where: "tuple[Keyring, ...]") -> None:
    """Look for a trusted key along one signer's chain (``pkcs7_validate_trust_one``)."""
    if signer.unsupported_crypto:
        raise KernelError(
            errno.ENOPKG,
            f"signer {signer.info.index} uses {signer.info.hash_name}, which this kernel does not have",
            "pkcs7_validate_trust_one",
        )
    signature = signer.signature
    last: Embedded | None = None
    embedded = signer.certificate
    while embedded is not None:
        if embedded.seen:
            if embedded.verified:
                _mark_verified(signer, embedded)
                return
            raise _no_key(f"{_who(signer)} is signed by nobody who is trusted")
        embedded.seen = True
        certificate = embedded.certificate
        try:
            key = find_asymmetric_key(keyrings, where, certificate.id, certificate.skid)
        except KernelError:
            key = None
        if key is not None:
            _check(key, signature, signer)
            _mark_verified(signer, embedded)
            return
        if embedded.signer is embedded:
            raise _no_key(
                f"{_who(signer)} ends in the self-signed certificate {_name(certificate)}, which is not trusted"
            )
        last = embedded
        signature = certificate.signature
        embedded = embedded.signer

    if last is not None:
        key = _find_issuer(keyrings, where, last.certificate)
        if key is not None:
            _check(key, last.certificate.signature, signer)
            _mark_verified(signer, last)
            return

    key = keyrings.find(where, signer.info.id)
    if key is None:
        raise _no_key(_why_unknown(signer, last))
    _check(key, signer.signature, signer)


def find_asymmetric_key(
    keyrings: "Keyrings", where: "tuple[Keyring, ...]", first: bytes | None, second: bytes | None
) -> Certificate | None:
    """Find a key by one identifier, or by one that another must agree with.

    The first may match either identifier of the key; the second only the key identifier. Raises KernelError:
    EKEYREJECTED where they do not agree, EINVAL for an empty identifier. Source: ``find_asymmetric_key``
    (crypto/asymmetric_keys/asymmetric_type.c).
    """
    sought = first if first is not None else second
    if sought is None:
        return None
    key = keyrings.find(where, sought)
    if key is not None and first is not None and second is not None and key.skid != second:
        raise KernelError(
            errno.EKEYREJECTED,
            f"the key {_name(key)} has the issuer and serial number that are looked for, but another key identifier",
            "find_asymmetric_key",
        )
    return key


def _find_issuer(keyrings: "Keyrings", where: "tuple[Keyring, ...]", certificate: Certificate) -> Certificate | None:
    return find_asymmetric_key(keyrings, where, certificate.authority_id, certificate.authority_skid)


def _check(key: Certificate, signature: Signature, signer: Signer) -> None:
    """Check a signature with a trusted key. Every fault found here is EKEYREJECTED."""
    try:
        public_key_verify_signature(key.public_key, signature)
    except KernelError as error:
        raise KernelError(
            errno.EKEYREJECTED,
            f"{_who(signer)}: not a signature by the key {_name(key)}: {error.reason}",
            "pkcs7_validate_trust_one",
        ) from error


def _mark_verified(signer: Signer, end: Embedded) -> None:
    end.verified = True
    embedded = signer.certificate
    while embedded is not None and embedded is not end:
        embedded.verified = True
        embedded = embedded.signer


def _no_key(reason: str) -> KernelError:
    return KernelError(errno.ENOKEY, reason, "pkcs7_validate_trust_one")


def _who(signer: Signer) -> str:
    return f"the chain of signer {signer.info.index}"


def _name(certificate: Certificate) -> str:
    return repr(certificate.readable_name)


def _why_unknown(signer: Signer, last: Embedded | None) -> str:
    if last is None:
        return (
            f"signer {signer.info.index} is no trusted key, and its certificate is not in the message "
            f"(identifier {signer.info.id.hex()[:64]})"
        )
    certificate = last.certificate
    if certificate.authority_id is None and certificate.authority_skid is None:
        return (
            f"{_who(signer)} ends in {_name(certificate)}, which is not trusted and has no authorityKeyIdentifier "
            "to find its issuer by (the issuer's name is not enough)"
        )
    return f"{_who(signer)} ends in {_name(certificate)}; its issuer is no trusted key"
