"""New keys and certificates for tests and rehearsals."""

import datetime
import os

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from ipe_emu.errors import UserError

KINDS = ("rsa2048", "rsa4096", "ec-p256", "ec-p384")
"""Kinds of keys a kernel verifies signatures with."""

MAX_COMMON_NAME = 64
"""RFC 5280, A.1: ub-common-name."""


def new_test_key(cn: str, kind: str = "rsa2048", *, days: int = 3650) -> tuple[bytes, bytes]:
    """Return a new private key (PKCS#8) and its self-signed certificate, both PEM.

    The certificate has a subject and an authority key identifier, as the kernel's own signing keys have:
    without them it could not vouch for others. Raises UserError for an unknown kind or an unusable name.
    """
    if not 0 < len(cn) <= MAX_COMMON_NAME or not cn.isprintable():
        raise UserError(f"a common name has 1 to {MAX_COMMON_NAME} printable characters, this one is {cn[:80]!r}")
    key = _generate(kind)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
    start = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    public_key = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(int.from_bytes(os.urandom(16)) >> 1 | 1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
        # A kernel refuses CA:FALSE where it is written out, and takes CA:TRUE from everybody.
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def _generate(kind: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if kind == "rsa2048":
        return rsa.generate_private_key(65537, 2048)
    if kind == "rsa4096":
        return rsa.generate_private_key(65537, 4096)
    if kind == "ec-p256":
        return ec.generate_private_key(ec.SECP256R1())
    if kind == "ec-p384":
        return ec.generate_private_key(ec.SECP384R1())
    raise UserError(f"unknown kind of key {kind!r}: choose from {', '.join(KINDS)}")


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
