"""Policies for tests, signed by the key that the emulated machines trust."""

from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs7

from tests.vectors import KEYS

ALLOW = "DEFAULT action=ALLOW\n"


@cache
def _signer() -> tuple[x509.Certificate, pkcs7.PKCS7PrivateKeyTypes]:
    certificate = x509.load_pem_x509_certificate((KEYS / "trusted.pem").read_bytes())
    key = serialization.load_pem_private_key((KEYS / "trusted.key").read_bytes(), None)
    return certificate, key  # type: ignore[return-value]  # a list of one kind


def signed(text: bytes) -> bytes:
    """Sign a text as ``openssl smime -sign -noattr -nodetach -binary -outform der`` does."""
    certificate, key = _signer()
    options = [pkcs7.PKCS7Options.Binary, pkcs7.PKCS7Options.NoAttributes]
    builder = pkcs7.PKCS7SignatureBuilder().set_data(text).add_signer(certificate, key, hashes.SHA256())
    return builder.sign(serialization.Encoding.DER, options)


def text(name: str, version: str = "1.0.0", body: str = ALLOW) -> bytes:
    return f"policy_name={name} policy_version={version}\n{body}".encode()


def policy(name: str, version: str = "1.0.0", body: str = ALLOW) -> bytes:
    """A signed policy."""
    return signed(text(name, version, body))
