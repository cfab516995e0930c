"""The object identifiers that decide something, as the octets that stand in the data.

An identifier is compared byte by byte and never decoded (``look_up_OID``); any other is unknown.
"""


def encode(dotted: str) -> bytes:
    """Return the content octets of an OBJECT IDENTIFIER (X.690, 8.19)."""
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    octets = bytearray()
    for arc in (first * 40 + second, *rest):
        group = [arc & 0x7F]
        while arc := arc >> 7:
            group.append(arc & 0x7F | 0x80)
        octets += bytes(reversed(group))
    return bytes(octets)


DATA = encode("1.2.840.113549.1.7.1")
SIGNED_DATA = encode("1.2.840.113549.1.7.2")
MS_INDIRECT_DATA = encode("1.3.6.1.4.1.311.2.1.4")

CONTENT_TYPE = encode("1.2.840.113549.1.9.3")
MESSAGE_DIGEST = encode("1.2.840.113549.1.9.4")
SIGNING_TIME = encode("1.2.840.113549.1.9.5")
SMIME_CAPABILITIES = encode("1.2.840.113549.1.9.15")
MS_STATEMENT_TYPE = encode("1.3.6.1.4.1.311.2.1.11")
MS_SP_OPUS_INFO = encode("1.3.6.1.4.1.311.2.1.12")

EMAIL_ADDRESS = encode("1.2.840.113549.1.9.1")
COMMON_NAME = encode("2.5.4.3")
ORGANIZATION_NAME = encode("2.5.4.10")

SUBJECT_KEY_IDENTIFIER = encode("2.5.29.14")
KEY_USAGE = encode("2.5.29.15")
BASIC_CONSTRAINTS = encode("2.5.29.19")
AUTHORITY_KEY_IDENTIFIER = encode("2.5.29.35")

RSA_ENCRYPTION = encode("1.2.840.113549.1.1.1")
EC_PUBLIC_KEY = encode("1.2.840.10045.2.1")

SHA1, SHA224, SHA256, SHA384, SHA512 = "sha1", "sha224", "sha256", "sha384", "sha512"
SHA3_256, SHA3_384, SHA3_512 = "sha3-256", "sha3-384", "sha3-512"
SM3, STREEBOG256, STREEBOG512 = "sm3", "streebog256", "streebog512"
"""Names of hashes in the kernel's crypto API."""

DIGESTS = {
    encode("1.3.14.3.2.26"): SHA1,
    encode("2.16.840.1.101.3.4.2.1"): SHA256,
    encode("2.16.840.1.101.3.4.2.2"): SHA384,
    encode("2.16.840.1.101.3.4.2.3"): SHA512,
    encode("2.16.840.1.101.3.4.2.4"): SHA224,
    encode("2.16.840.1.101.3.4.2.8"): SHA3_256,
    encode("2.16.840.1.101.3.4.2.9"): SHA3_384,
    encode("2.16.840.1.101.3.4.2.10"): SHA3_512,
    encode("1.2.156.10197.1.401"): SM3,
    encode("1.2.643.7.1.1.2.2"): STREEBOG256,
    encode("1.2.643.7.1.1.2.3"): STREEBOG512,
}
"""What a SignerInfo's digestAlgorithm may name (``pkcs7_sig_note_digest_algo``)."""

RSA, ECDSA, ECRDSA = "rsa", "ecdsa", "ecrdsa"

_ECDSA_WITH = {
    encode("1.2.840.10045.4.1"): SHA1,
    encode("1.2.840.10045.4.3.1"): SHA224,
    encode("1.2.840.10045.4.3.2"): SHA256,
    encode("1.2.840.10045.4.3.3"): SHA384,
    encode("1.2.840.10045.4.3.4"): SHA512,
    encode("2.16.840.1.101.3.4.3.10"): SHA3_256,
    encode("2.16.840.1.101.3.4.3.11"): SHA3_384,
    encode("2.16.840.1.101.3.4.3.12"): SHA3_512,
}
_RSA_WITH = {
    encode("1.2.840.113549.1.1.5"): SHA1,
    encode("1.2.840.113549.1.1.11"): SHA256,
    encode("1.2.840.113549.1.1.12"): SHA384,
    encode("1.2.840.113549.1.1.13"): SHA512,
    encode("1.2.840.113549.1.1.14"): SHA224,
    encode("2.16.840.1.101.3.4.3.14"): SHA3_256,
    encode("2.16.840.1.101.3.4.3.15"): SHA3_384,
    encode("2.16.840.1.101.3.4.3.16"): SHA3_512,
}
_GOST_WITH = {
    encode("1.2.643.7.1.1.3.2"): STREEBOG256,
    encode("1.2.643.7.1.1.3.3"): STREEBOG512,
}
_GOST_KEYS = (encode("1.2.643.7.1.1.1.1"), encode("1.2.643.7.1.1.1.2"))

CERTIFICATE_SIGNATURES = (
    {oid: (RSA, digest) for oid, digest in _RSA_WITH.items()}
    | {oid: (ECDSA, digest) for oid, digest in _ECDSA_WITH.items()}
    | {oid: (ECRDSA, digest) for oid, digest in _GOST_WITH.items()}
)
"""What a certificate's signatureAlgorithm may name: key algorithm and hash (``x509_note_sig_algo``)."""

SIGNER_SIGNATURES = {RSA_ENCRYPTION: RSA} | dict.fromkeys(_ECDSA_WITH, ECDSA) | dict.fromkeys(_GOST_KEYS, ECRDSA)
"""What a SignerInfo's signatureAlgorithm may name (``pkcs7_sig_note_pkey_algo``).

sha256WithRSAEncryption is not among them, and the hash an ECDSA identifier names is ignored: the
digestAlgorithm alone says which hash was signed.
"""

KEYS_WITHOUT_CURVE = {RSA_ENCRYPTION: RSA} | dict.fromkeys(_GOST_KEYS, ECRDSA)
"""Key algorithms whose parameters are not looked at (``x509_extract_key_data``)."""

CURVES = {
    encode("1.2.840.10045.3.1.1"): "ecdsa-nist-p192",
    encode("1.2.840.10045.3.1.7"): "ecdsa-nist-p256",
    encode("1.3.132.0.34"): "ecdsa-nist-p384",
    encode("1.3.132.0.35"): "ecdsa-nist-p521",
}
"""Named curves, by the kernel's name of the key algorithm."""
