"""``verify_pkcs7_signature`` as IPE calls it, keyring after keyring."""

import errno
from typing import TYPE_CHECKING

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7 import digest, oids
from ipe_emu.pkcs7.signature import Signature, public_key_verify_signature
from ipe_emu.pkcs7.signed_data import Attributes, SignedData, SignerInfo, parse_signed_data
from ipe_emu.pkcs7.trust import Embedded, Message, Signer, validate_trust
from ipe_emu.pkcs7.x509 import Certificate

if TYPE_CHECKING:
    from ipe_emu.keyring import Keyring, Keyrings


def verify_pkcs7_signature(
    blob: bytes,
    keyrings: "Keyrings",
    *,
    content: bytes | None = None,
    unavailable_hashes: frozenset[str] = frozenset(),
) -> bytes:
    """Return the content of ``blob`` if a trusted key has signed it.

    ``content`` is what a detached signature is for. ``unavailable_hashes`` are hashes the emulated kernel
    was built without, by its names; a hash neither named there nor known to this Python is refused.

    Raises KernelError: EMSGSIZE, EBADMSG, EINVAL, ENOPKG, EKEYREJECTED, ENOKEY, ENODATA; of keys or
    certificates that no tool makes also ENOMEM and ENOENT. Source: ``verify_pkcs7_signature``
    (certs/system_keyring.c) as ``ipe_new_policy`` calls it (security/ipe/policy.c).
    """
    parsed = parse_signed_data(blob, unavailable_hashes)
    verification = _Verification(parsed, keyrings, unavailable_hashes)
    further = [(".ipe", keyrings.ipe)] if keyrings.ipe else []
    if keyrings.platform is not None:
        further.append((".platform", keyrings.platform))
    try:
        return verification.run(keyrings.trusted(), content)
    except KernelError as error:
        answer = error
    for name, keyring in further:
        if answer.errno not in {errno.ENOKEY, errno.EKEYREJECTED}:
            break
        # The last answer counts alone: a bad signature by a trusted key, whose certificate is not in the
        # message, becomes ENOKEY because the platform keyring does not know the key.
        try:
            return verification.run((keyring,), content)
        except KernelError as error:
            if error.errno != answer.errno:
                reason = f"{error.reason} (asked of the keyring {name}; before that, {answer})"
                error = KernelError(error.errno, reason, error.function)
            answer = error
    raise answer


class _Verification:
    """What does not change between two runs over one message."""

    def __init__(self, parsed: SignedData, keyrings: "Keyrings", unavailable_hashes: frozenset[str]) -> None:
        self.parsed = parsed
        self.keyrings = keyrings
        self.unavailable_hashes = unavailable_hashes
        self.links: dict[tuple[int, int], KernelError | None] = {}

    def run(self, trusted: "tuple[Keyring, ...]", detached: bytes | None) -> bytes:
        """Verify from the start (``verify_pkcs7_message_sig``)."""
        content = self.parsed.content
        if detached is not None:
            if content is not None:
                raise KernelError(
                    errno.EBADMSG,
                    "a signature with content, where a detached one is wanted",
                    "verify_pkcs7_message_sig",
                )
            content = detached
        if self.parsed.content_type != oids.DATA:
            raise KernelError(errno.EKEYREJECTED, "an Authenticode message cannot sign a policy", "pkcs7_verify")
        message = Message([Embedded(cert, self.keyrings.is_blacklisted(cert)) for cert in self.parsed.certificates])
        self._verify(message, content or b"")
        self._check_revocation(message)
        validate_trust(message, self.keyrings, trusted)
        if content is None:
            raise KernelError(
                errno.ENODATA, "the signature is good, but there is no content in the message", "pkcs7_get_content_data"
            )
        return content

    def _verify(self, message: Message, content: bytes) -> None:
        """Check what the message says about itself (``pkcs7_verify``)."""
        digests: dict[str, bytes] = {}
        verified = False
        failure: KernelError | None = None
        for info in self.parsed.signers:
            signature = Signature(info.value, info.algorithm, info.hash_name, None)
            signer = Signer(info, signature)
            message.signers.append(signer)
            try:
                signer.signature = self._digest(info, content, digests)
            except digest.UnavailableError:
                signer.unsupported_crypto = True
                failure = failure or KernelError(
                    errno.ENOPKG,
                    f"signer {info.index} uses {info.hash_name}, which this kernel does not have",
                    "pkcs7_digest",
                )
                continue
            signer.certificate = message.by_id.get(info.id)
            if signer.certificate is not None:
                self._verify_with_certificate(message, signer, signer.certificate)
            if signer.blacklisted:
                failure = KernelError(
                    errno.EKEYREJECTED,
                    f"a certificate in the chain of signer {info.index} is blacklisted",
                    "pkcs7_verify",
                )
            else:
                verified = True
        if not verified and failure is not None:
            raise failure

    def _digest(self, info: SignerInfo, content: bytes, digests: dict[str, bytes]) -> Signature:
        """Return the signature with what it is over: the content, or the signed attributes (``pkcs7_digest``)."""
        if info.hash_name not in digests:
            digests[info.hash_name] = digest.compute(info.hash_name, content, self.unavailable_hashes)
        value = digests[info.hash_name]
        attributes = info.attributes
        if attributes.signed is not None:
            _check_message_digest(info.index, attributes, value)
            value = digest.compute(info.hash_name, attributes.signed, self.unavailable_hashes)
        return Signature(info.value, info.algorithm, info.hash_name, value)

    def _verify_with_certificate(self, message: Message, signer: Signer, embedded: Embedded) -> None:
        certificate = embedded.certificate
        time = signer.info.attributes.signing_time
        if time is not None and not certificate.valid_from <= time <= certificate.valid_to:
            raise KernelError(
                errno.EKEYREJECTED,
                f"the signingTime of signer {signer.info.index} is outside the validity of its certificate "
                f"{certificate.readable_name!r}",
                "pkcs7_verify_one",
            )
        public_key_verify_signature(certificate.public_key, signer.signature)
        self._verify_chain(message, signer, embedded)

    def _verify_chain(self, message: Message, signer: Signer, embedded: Embedded) -> None:
        """Check each certificate with the embedded one that issued it, and link them (``pkcs7_verify_sig_chain``)."""
        message.forget_seen()
        start = embedded
        while True:
            embedded.seen = True
            if embedded.blacklisted:
                signer.blacklisted = True
                _blacklist_dependents(start, embedded)
                return
            if embedded.certificate.self_signed:
                embedded.signer = embedded
                return
            issuer = _embedded_issuer(message, embedded.certificate)
            # A loop is no fault: the chain ends there, unlinked.
            if issuer is None or issuer.seen:
                return
            self._check_link(issuer.certificate, embedded.certificate)
            embedded.signer = issuer
            embedded = issuer

    def _check_link(self, issuer: Certificate, certificate: Certificate) -> None:
        """Check one certificate's signature with another's key, once for all signers and runs."""
        link = (id(issuer), id(certificate))
        if link not in self.links:
            try:
                public_key_verify_signature(issuer.public_key, certificate.signature)
            except KernelError as error:
                self.links[link] = KernelError(
                    error.errno,
                    f"{certificate.readable_name!r} is not signed by {issuer.readable_name!r}: {error.reason}",
                    error.function,
                )
            else:
                self.links[link] = None
        failure = self.links[link]
        if failure is not None:
            raise failure

    def _check_revocation(self, message: Message) -> None:
        """Refuse what the keys in the blacklist keyring vouch for (``is_key_on_revocation_list``)."""
        try:
            validate_trust(message, self.keyrings, (self.keyrings.revocation,))
        except KernelError:
            return
        raise KernelError(
            errno.EKEYREJECTED, "the signer's key, or one that vouches for it, is revoked", "is_key_on_revocation_list"
        )


def _check_message_digest(index: int, attributes: Attributes, value: bytes) -> None:
    """Check the messageDigest attribute, of unknown signers too: this comes before any key is looked for."""
    expected = attributes.message_digest
    if expected is None or len(expected) != len(value):
        raise KernelError(
            errno.EBADMSG, f"the messageDigest attribute of signer {index} has the wrong size", "pkcs7_digest"
        )
    if expected != value:
        raise KernelError(
            errno.EKEYREJECTED,
            f"the messageDigest attribute of signer {index} is not the digest of the content",
            "pkcs7_digest",
        )


def _embedded_issuer(message: Message, certificate: Certificate) -> Embedded | None:
    """Return the embedded certificate that an authorityKeyIdentifier names; the issuer's name alone names none."""
    if certificate.authority_id is None:
        return None if certificate.authority_skid is None else message.by_skid.get(certificate.authority_skid)
    issuer = message.by_id.get(certificate.authority_id)
    if (
        issuer is not None
        and certificate.authority_skid is not None
        and issuer.certificate.skid != certificate.authority_skid
    ):
        raise KernelError(
            errno.EKEYREJECTED,
            f"the authorityKeyIdentifier of {certificate.readable_name!r} names an embedded certificate by issuer and "
            "serial number, and another key by its identifier",
            "pkcs7_verify_sig_chain",
        )
    return issuer


def _blacklist_dependents(start: Embedded, end: Embedded) -> None:
    """Mark what depends on a blacklisted certificate, for the signers that come later."""
    embedded: Embedded | None = start
    while embedded is not None and embedded is not end:
        embedded.blacklisted = True
        embedded = embedded.signer
