"""Write ASN.1 by hand, well-formed or not, and build signed data from its parts."""

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ipe_emu.pkcs7 import oids
from tests.vectors import KEYS

NULL = b"\x05\x00"


def tlv(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    if size < 0x100:
        return bytes([tag, 0x81, size]) + content
    return bytes([tag, 0x82]) + size.to_bytes(2) + content


def indefinite(tag: int, *parts: bytes) -> bytes:
    return bytes([tag, 0x80]) + b"".join(parts) + b"\0\0"


def seq(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def oid(dotted: str) -> bytes:
    return tlv(6, oids.encode(dotted))


SHA256 = seq(oid("2.16.840.1.101.3.4.2.1"), NULL)
RSA = seq(oid("1.2.840.113549.1.1.1"), NULL)
ECDSA_SHA256 = seq(oid("1.2.840.10045.4.3.2"))
DATA = oid("1.2.840.113549.1.7.1")
SIGNED_DATA = oid("1.2.840.113549.1.7.2")


class Identity:
    """A key and certificate of the recorded kernels, or new ones."""

    def __init__(self, certificate: x509.Certificate, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self.key = key
        self.der = certificate.public_bytes(Encoding.DER)
        self.sid = seq(certificate.issuer.public_bytes(), tlv(2, _unsigned(certificate.serial_number)))

    @classmethod
    def recorded(cls, name: str) -> "Identity":
        key = load_pem_private_key((KEYS / f"{name}.key").read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate((KEYS / f"{name}.pem").read_bytes()), key)

    @property
    def algorithm(self) -> bytes:
        return RSA if isinstance(self.key, rsa.RSAPrivateKey) else ECDSA_SHA256

    def sign(self, data: bytes) -> bytes:
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))


def _unsigned(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1)


def signer_info(
    who: Identity, content: bytes, *, version: int = 1, sid: bytes | None = None, signature: bytes | None = None
) -> bytes:
    return seq(
        tlv(2, bytes([version])),
        sid if sid is not None else who.sid,
        SHA256,
        who.algorithm,
        tlv(4, signature if signature is not None else who.sign(content)),
    )


def content_info(content: bytes) -> bytes:
    return seq(DATA, tlv(0xA0, tlv(4, content)))


def signed_data(*signers: bytes, content: bytes, certificates: bytes = b"", version: int = 1) -> bytes:
    embedded = tlv(0xA0, certificates) if certificates else b""
    return wrap(tlv(2, bytes([version])), tlv(0x31, SHA256), content_info(content), embedded, tlv(0x31, *signers))


def wrap(*parts: bytes) -> bytes:
    return seq(SIGNED_DATA, tlv(0xA0, seq(*parts)))
