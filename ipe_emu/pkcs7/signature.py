"""Check one signature with one public key, with the kernel's errno for each way in which it can be wrong.

``cryptography`` verifies first. Only what it refuses is looked at again with plain integers, to find out
what the kernel says to it: in rare cases that is yes (a zero-padded integer, an RSA key whose size is not
a multiple of 64 bits). It is imported when the first signature is checked: that costs more time than
everything else here.
"""

import errno
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7 import ber, oids

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

RSA_BITS = frozenset({512, 1024, 1536, 2048, 3072, 4096})
"""Sizes of moduli, rounded up to 64 bits (``rsa_check_key_length``)."""

MAX_INTEGER = 16384
"""Bits of the largest integer the kernel reads (``MAX_EXTERN_MPI_BITS``)."""

MAX_EXPONENT = 256
"""Bits of the largest RSA exponent that is tried here, as in FIPS mode. Otherwise a kernel tries any."""

_DIGEST_INFO_PREFIX = {
    name: bytes.fromhex(prefix)
    for name, prefix in {
        oids.SHA1: "3021300906052b0e03021a05000414",
        oids.SHA224: "302d300d06096086480165030402040500041c",
        oids.SHA256: "3031300d060960864801650304020105000420",
        oids.SHA384: "3041300d060960864801650304020205000430",
        oids.SHA512: "3051300d060960864801650304020305000440",
        oids.SHA3_256: "3031300d060960864801650304020805000420",
        oids.SHA3_384: "3041300d060960864801650304020905000430",
        oids.SHA3_512: "3051300d060960864801650304020a05000440",
    }.items()
}
"""DigestInfo up to the digest, in the one encoding that is accepted (RFC 8017, 9.2, note 1)."""


class _Curve(NamedTuple):
    cryptography_name: str
    digits: int
    """64-bit digits of a coordinate (``ecc_curve.g.ndigits``)."""
    p: int
    n: int


_CURVES = {
    "ecdsa-nist-p192": _Curve("SECP192R1", 3, 2**192 - 2**64 - 1, 0xFFFFFFFFFFFFFFFFFFFFFFFF99DEF836146BC9B1B4D22831),
    "ecdsa-nist-p256": _Curve(
        "SECP256R1",
        4,
        2**256 - 2**224 + 2**192 + 2**96 - 1,
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    ),
    "ecdsa-nist-p384": _Curve(
        "SECP384R1",
        6,
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        int(
            "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
            16,
        ),
    ),
    "ecdsa-nist-p521": _Curve(
        "SECP521R1",
        9,
        2**521 - 1,
        int(
            "01fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa"
            "51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409",
            16,
        ),
    ),
}
"""Field prime and order of each curve (SEC 2), with its size in the kernel's arithmetic."""


@frozen
class PublicKey:
    """A public key as a certificate carries it: the kernel's algorithm name and the undecoded key.

    A key that cannot be decoded is a fault of the verification, not of the certificate
    (``public_key_verify_signature`` sets the key anew each time).
    """

    algorithm: str
    data: bytes


@frozen
class Signature:
    """A signature over a digest (kernel: ``struct public_key_signature``).

    ``digest`` is None where the hash is not available in the emulated kernel.
    """

    value: bytes
    algorithm: str
    """``rsa`` (PKCS#1 v1.5), ``ecdsa`` (X9.62) or ``ecrdsa``."""
    hash_name: str
    digest: bytes | None


def public_key_verify_signature(key: PublicKey, signature: Signature) -> None:
    """Return if the signature is good; raise KernelError with the kernel's errno if not.

    Source: ``public_key_verify_signature``, ``pkcs1pad_verify`` and ``ecdsa_verify``; RFC 8017, 8.2.2.
    """
    if signature.algorithm == oids.RSA == key.algorithm:
        _verify_rsa(key, signature)
    elif signature.algorithm == oids.ECDSA and key.algorithm in _CURVES:
        _verify_ecdsa(key, signature)
    elif signature.algorithm == oids.ECRDSA == key.algorithm:
        _verify_ecrdsa(signature)
    else:
        raise KernelError(
            errno.EKEYREJECTED,
            f"a signature said to be {signature.algorithm} cannot be checked with a {key.algorithm} key",
            "public_key_verify_signature",
        )


def _verify_ecrdsa(signature: Signature) -> None:
    if signature.hash_name not in {oids.STREEBOG256, oids.STREEBOG512}:
        raise KernelError(
            errno.EINVAL, f"a GOST signature over {signature.hash_name}", "software_key_determine_akcipher"
        )
    # Where streebog is not built in, ecrdsa is not either, and crypto_alloc_sig's errno is passed on.
    raise KernelError(errno.ENOENT, "GOST signatures (ecrdsa) are not available", "crypto_alloc_sig")


class _RsaKey(NamedTuple):
    n: int
    e: int
    size: int
    """Length of signatures in bytes: the modulus rounded up to eight bytes (``mpi_get_size``)."""


@lru_cache(maxsize=256)
def _decode_rsa_key(data: bytes) -> _RsaKey:
    """Decode an RSAPublicKey (RFC 8017, A.1.1) as ``rsa_parse_pub_key`` and ``rsa_set_pub_key`` do."""
    cursor = ber.Cursor(data, "RSA public key")
    frame = cursor.enter(ber.SEQUENCE)
    raw_n = cursor.primitive(ber.INTEGER)
    if not raw_n:
        raise KernelError(errno.EINVAL, "RSA public key with an empty modulus", "rsa_get_n")
    raw_e = cursor.primitive(ber.INTEGER)
    if not raw_e or len(raw_e) > len(raw_n):
        raise KernelError(errno.EINVAL, "RSA public key whose exponent is empty or longer than n", "rsa_get_e")
    cursor.leave(frame)
    for raw in (raw_e, raw_n):
        if len(raw.lstrip(b"\0")) * 8 > MAX_INTEGER:
            raise KernelError(
                errno.ENOMEM, f"RSA public key with a number of more than {MAX_INTEGER} bits", "rsa_set_pub_key"
            )
    n = int.from_bytes(raw_n)
    size = -(-n.bit_length() // 64) * 8
    if size * 8 not in RSA_BITS:
        raise KernelError(
            errno.EINVAL, f"an RSA key of {n.bit_length()} bits; the kernel takes {sorted(RSA_BITS)}", "rsa_set_pub_key"
        )
    e = int.from_bytes(raw_e)
    if e.bit_length() > MAX_EXPONENT:
        raise KernelError(
            errno.EINVAL,
            f"an RSA exponent of {e.bit_length()} bits, which only a kernel outside of FIPS mode would try",
            "rsa_check_exponent_fips",
        )
    return _RsaKey(n, e, size)


def _verify_rsa(key: PublicKey, signature: Signature) -> None:
    prefix = _DIGEST_INFO_PREFIX.get(signature.hash_name)
    if prefix is None:
        raise KernelError(errno.EINVAL, f"RSA signatures over {signature.hash_name} are not known", "pkcs1pad_create")
    rsa_key = _decode_rsa_key(key.data)
    if not signature.digest:
        raise KernelError(errno.EINVAL, "there is no digest to check the signature against", "pkcs1pad_verify")
    if len(signature.value) != rsa_key.size:
        raise KernelError(
            errno.EINVAL,
            f"an RSA signature of {len(signature.value)} bytes where the key asks for {rsa_key.size}",
            "pkcs1pad_verify",
        )
    if not _openssl_accepts_rsa(rsa_key, signature):
        _classify_rsa(rsa_key, signature.value, prefix, signature.digest)


def _classify_rsa(key: _RsaKey, value: bytes, prefix: bytes, digest: bytes) -> None:
    """Decide with integers what ``rsa_enc`` and ``pkcs1pad_verify_complete`` say to a signature."""
    number = int.from_bytes(value)
    if not 1 < number < key.n - 1:
        raise KernelError(errno.EINVAL, "an RSA signature that is no number between 2 and n-2", "rsa_check_payload")
    message = pow(number, key.e, key.n).to_bytes(key.size)
    if message[0] != 0:
        raise KernelError(
            errno.EINVAL,
            "the RSA signature does not decode with this key (a damaged signature, or another key's)",
            "pkcs1pad_verify_complete",
        )
    padding = len(message) - 2 - len(message[2:].lstrip(b"\xff"))
    start = 2 + padding + 1
    if message[1] != 1 or padding < 8 or message[start - 1 : start] != b"\0":
        raise KernelError(
            errno.EBADMSG,
            "the RSA signature decodes to something without PKCS#1 v1.5 signature padding",
            "pkcs1pad_verify_complete",
        )
    if message[start : start + len(prefix)] != prefix:
        raise KernelError(
            errno.EBADMSG,
            "the RSA signature names another digest algorithm, or encodes it in another way",
            "pkcs1pad_verify_complete",
        )
    if message[start + len(prefix) :] != digest:
        raise KernelError(
            errno.EKEYREJECTED,
            "the signature is for other data: what was signed is not what is here",
            "pkcs1pad_verify_complete",
        )


def _verify_ecdsa(key: PublicKey, signature: Signature) -> None:
    if signature.hash_name not in _DIGEST_INFO_PREFIX:
        raise KernelError(
            errno.EINVAL, f"ECDSA over {signature.hash_name} is not known", "software_key_determine_akcipher"
        )
    curve = _CURVES[key.algorithm]
    public_key = _load_point(key.algorithm, key.data)
    r, s = _decode_ecdsa_signature(signature.value, curve)
    if not (0 < r < curve.n and 0 < s < curve.n):
        raise KernelError(errno.EBADMSG, "an ECDSA signature whose r or s is zero or not below n", "_ecdsa_verify")
    if not signature.digest or not _openssl_accepts_ecdsa(public_key, r, s, signature.digest):
        raise KernelError(
            errno.EKEYREJECTED, "the ECDSA signature is for other data, or by another key", "_ecdsa_verify"
        )


def _decode_ecdsa_signature(value: bytes, curve: _Curve) -> tuple[int, int]:
    """Decode r and s (RFC 3279, 2.2.3), which are read as unsigned; what follows the SEQUENCE is ignored."""
    cursor = ber.Cursor(value, "ECDSA signature")
    frame = cursor.enter(ber.SEQUENCE)
    r = _ecdsa_integer(cursor.primitive(ber.INTEGER), curve)
    s = _ecdsa_integer(cursor.primitive(ber.INTEGER), curve)
    cursor.leave(frame)
    return r, s


def _ecdsa_integer(raw: bytes, curve: _Curve) -> int:
    size = curve.digits * 8
    if not raw or len(raw) > size + 1 or (len(raw) == size + 1 and raw[0] != 0):
        raise KernelError(
            errno.EINVAL, "an ECDSA signature with an integer that is empty or too long", "ecdsa_get_signature_rs"
        )
    return int.from_bytes(raw)


@lru_cache(maxsize=256)
def _load_point(algorithm: str, data: bytes) -> "EllipticCurvePublicKey":
    """Load an uncompressed point (SEC 1, 2.3.4) as ``ecdsa_set_pub_key`` does, or raise EINVAL.

    Coordinates may be shorter or longer than the field asks for as long as they fill as many digits.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - only where it is needed: slow
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - as above

    curve = _CURVES[algorithm]
    half, odd = divmod(len(data) - 1, 2)
    if len(data) < 1 or odd or data[0] != 4 or -(-half // 8) != curve.digits:
        raise KernelError(errno.EINVAL, "an EC public key that is not an uncompressed point", "ecdsa_set_pub_key")
    x, y = int.from_bytes(data[1 : 1 + half]), int.from_bytes(data[1 + half :])
    if x < curve.p and y < curve.p:
        try:
            return ec.EllipticCurvePublicNumbers(x, y, getattr(ec, curve.cryptography_name)()).public_key()
        except UnsupportedAlgorithm:
            raise KernelError(
                errno.EKEYREJECTED, f"the cryptography installed here lacks {algorithm}", "crypto_alloc_sig"
            ) from None
        except ValueError:
            pass
    raise KernelError(errno.EINVAL, "an EC public key that is no point of its curve", "ecc_is_pubkey_valid_full")


@lru_cache(maxsize=16)
def _prehashed(name: str) -> "Prehashed":
    """Return the wrapper by which ``cryptography`` takes a digest that is computed already."""
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 - only where it is needed: slow
    from cryptography.hazmat.primitives.asymmetric import utils  # noqa: PLC0415 - as above

    algorithm: hashes.HashAlgorithm = getattr(hashes, name.upper().replace("-", "_"))()
    return utils.Prehashed(algorithm)


_ECDSA_HASH_OF_SIZE = {20: oids.SHA1, 28: oids.SHA224, 32: oids.SHA256, 48: oids.SHA384, 64: oids.SHA512}
"""For ECDSA a digest is a number; only its length says which wrapper fits."""


@lru_cache(maxsize=256)
def _load_rsa(n: int, e: int) -> "RSAPublicKey | None":
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415 - only where it is needed: slow

    try:
        return rsa.RSAPublicNumbers(e, n).public_key()
    except ValueError:
        return None


def _openssl_accepts_rsa(key: _RsaKey, signature: Signature) -> bool:
    """Return whether ``cryptography`` accepts the signature; it accepts nothing the kernel refuses."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415 - any type
    from cryptography.hazmat.primitives.asymmetric import padding  # noqa: PLC0415 - as above

    public_key = _load_rsa(key.n, key.e)
    if public_key is None or signature.digest is None:
        return False
    try:
        public_key.verify(signature.value, signature.digest, padding.PKCS1v15(), _prehashed(signature.hash_name))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _openssl_accepts_ecdsa(public_key: "EllipticCurvePublicKey", r: int, s: int, digest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - only where it is needed: slow
    from cryptography.hazmat.primitives.asymmetric import ec, utils  # noqa: PLC0415 - as above

    algorithm = ec.ECDSA(_prehashed(_ECDSA_HASH_OF_SIZE[len(digest)]))
    try:
        public_key.verify(utils.encode_dss_signature(r, s), digest, algorithm)
    except InvalidSignature:
        return False
    return True
