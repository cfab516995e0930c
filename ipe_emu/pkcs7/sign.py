"""Sign a policy as ``openssl smime -sign -noattr -nodetach -binary -outform der`` would, and other things detached."""

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs7

from ipe_emu.errors import UserError
from ipe_emu.pkcs7.signed_data import MAX_SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

DIGESTS: dict[str, type[hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
    "sha224": hashes.SHA224,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
"""Digests to sign with, by the kernel's names."""


def sign_policy(
    text: bytes, key: bytes, certificate: bytes, *, digest: str = "sha256", password: bytes | None = None
) -> bytes:
    """Return DER-encoded SignedData over ``text``, with the signer's certificate and without attributes.

    ``key`` and ``certificate`` are PEM or DER; ``password`` is for an encrypted key. Raises UserError if
    they cannot be read or do not belong together, for keys a kernel does not have, and if the result is
    larger than a kernel takes (65,535 bytes).
    """
    blob = _sign(text, key, certificate, digest, password, [])
    if len(blob) > MAX_SIZE:
        raise UserError(
            f"the signed policy has {len(blob)} bytes; a kernel takes {MAX_SIZE} at most (EMSGSIZE): "
            f"shorten the text by {len(blob) - MAX_SIZE} bytes"
        )
    return blob


def sign_detached(
    content: bytes, key: bytes, certificate: bytes, *, digest: str = "sha256", password: bytes | None = None
) -> bytes:
    """Return DER-encoded SignedData over ``content``, with neither content, certificates nor attributes in it.

    This is what ``fsverity sign`` makes of a formatted digest. UserError as ``sign_policy``.
    """
    options = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.NoCerts]
    return _sign(content, key, certificate, digest, password, options)


def _sign(
    content: bytes,
    key: bytes,
    certificate: bytes,
    digest: str,
    password: bytes | None,
    more_options: list[pkcs7.PKCS7Options],
) -> bytes:
    if digest not in DIGESTS:
        raise UserError(f"unknown digest {digest!r}: choose from {', '.join(DIGESTS)}")
    private_key = _load_key(key, password)
    signer = _load_certificate(certificate)
    if not isinstance(private_key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise UserError("a kernel has RSA and ECDSA keys only; this key is neither")
    if private_key.public_key() != signer.public_key():
        raise UserError("the private key does not belong to the certificate")
    options = [pkcs7.PKCS7Options.NoAttributes, pkcs7.PKCS7Options.Binary, *more_options]
    builder = pkcs7.PKCS7SignatureBuilder().set_data(content).add_signer(signer, private_key, DIGESTS[digest]())
    try:
        return builder.sign(serialization.Encoding.DER, options)
    except ValueError as error:
        raise UserError(f"signing failed: {error}") from error


def _load_key(data: bytes, password: bytes | None) -> "PrivateKeyTypes":
    load = serialization.load_pem_private_key if b"-----BEGIN " in data else serialization.load_der_private_key
    try:
        return load(data, password)
    except TypeError as error:
        raise UserError(f"private key: {error}") from error
    except Exception as error:  # the library raises ValueError and classes of its own
        raise UserError(f"no private key that can be read: {error}") from error


def _load_certificate(data: bytes) -> x509.Certificate:
    load = x509.load_pem_x509_certificate if b"-----BEGIN " in data else x509.load_der_x509_certificate
    try:
        return load(data)
    except ValueError as error:
        raise UserError(f"no certificate that can be read: {error}") from error
