"""What the kernel does that no recorded blob shows; each from the function named."""

import errno
from collections.abc import Callable

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.keyring import Keyrings
from ipe_emu.pkcs7 import MAX_SIZE, parse_signed_data, verify_pkcs7_signature
from ipe_emu.pkcs7.x509 import Certificate, parse_certificate
from tests.pkcs7.der import (
    DATA,
    SHA256,
    SIGNED_DATA,
    Identity,
    content_info,
    indefinite,
    oid,
    seq,
    signed_data,
    signer_info,
    tlv,
    wrap,
)
from tests.pkcs7.material import BUILTIN, PLAIN, TEXT, answer, blob_of

TRUSTED = Identity.recorded("trusted")
EC = Identity.recorded("ec")
UNTRUSTED = Identity.recorded("untrusted")


def parsed(identity: Identity) -> Certificate:
    return parse_certificate(identity.der)


def test_the_builder_makes_what_is_accepted() -> None:
    assert answer(signed_data(signer_info(TRUSTED, TEXT), content=TEXT), PLAIN) == TEXT


def test_sizes() -> None:
    good = signed_data(signer_info(TRUSTED, TEXT), content=TEXT)
    assert answer(good.ljust(MAX_SIZE, b"\0"), PLAIN) == TEXT
    assert answer(good.ljust(MAX_SIZE + 1, b"\0"), PLAIN) == "EMSGSIZE"


@pytest.mark.parametrize(
    ("inner", "expected"),
    [(seq(DATA), "EINVAL"), (indefinite(0x30, DATA), "EBADMSG"), (content_info(TEXT), "EINVAL")],
    ids=["definite", "indefinite_without_content", "with_content"],
)
def test_no_signer_infos_at_all(inner: bytes, expected: str) -> None:
    # asn1_ber_decoder: at the end of the data an alternative is missing or present as the last match says.
    assert answer(wrap(tlv(2, b"\1"), tlv(0x31, SHA256), inner), PLAIN) == expected


def test_signed_data_without_content_is_no_message() -> None:
    assert answer(seq(SIGNED_DATA), PLAIN) == "EINVAL"


def test_an_empty_key_identifier_is_invalid_where_it_is_looked_up() -> None:
    # asymmetric_key_hex_to_key_id
    blob = signed_data(signer_info(TRUSTED, TEXT, version=3, sid=tlv(0x80)), content=TEXT, version=3)
    assert answer(blob, PLAIN) == "EINVAL"


def test_a_first_signer_of_version_1_with_a_key_identifier_has_no_identifier() -> None:
    # pkcs7_note_signed_info uses issuer and serial number, of which there are none yet.
    blob = signed_data(signer_info(TRUSTED, TEXT, sid=tlv(0x80, b"12345678")), content=TEXT)
    assert answer(blob, PLAIN) == "EINVAL"


def test_a_signer_of_version_3_with_issuer_and_serial_uses_the_key_identifier_before_it() -> None:
    skid = parsed(TRUSTED).skid
    assert skid is not None
    first = signer_info(TRUSTED, TEXT, version=3, sid=tlv(0x80, skid))
    second = signer_info(TRUSTED, TEXT, version=3, sid=UNTRUSTED.sid)
    assert answer(signed_data(first, second, content=TEXT, version=3), PLAIN) == TEXT
    assert answer(signed_data(second, first, content=TEXT, version=3), PLAIN) == "EINVAL"


def test_a_revoked_chain_that_verified_counts_if_another_signer_stops_the_search() -> None:
    # is_key_on_revocation_list ignores how pkcs7_validate_trust failed, and what that marked as verified stays so.
    revoked = Keyrings(builtin=BUILTIN, revocation=(parsed(UNTRUSTED), parsed(Identity.recorded("leaf"))))
    good = signer_info(UNTRUSTED, TEXT)
    wrong = signer_info(Identity.recorded("leaf"), b"something else")
    assert answer(signed_data(good, content=TEXT, certificates=UNTRUSTED.der), revoked) == "EKEYREJECTED"
    assert answer(signed_data(good, good, content=TEXT, certificates=UNTRUSTED.der), revoked) == "EKEYREJECTED"
    assert answer(signed_data(good, wrong, content=TEXT, certificates=UNTRUSTED.der), revoked) == "ENOKEY"
    assert answer(signed_data(good, good, wrong, content=TEXT, certificates=UNTRUSTED.der), revoked) == TEXT


def test_a_hash_nobody_has_is_refused_even_beside_a_good_signer() -> None:
    blob = blob_of("403_m_good_streebog")
    assert isinstance(answer(blob, PLAIN), bytes)
    assert answer(blob, PLAIN, frozenset()) == "ENOPKG"


def test_detached_signatures() -> None:
    inner = seq(DATA)
    blob = wrap(tlv(2, b"\1"), tlv(0x31, SHA256), inner, tlv(0x31, signer_info(TRUSTED, TEXT)))
    assert verify_pkcs7_signature(blob, PLAIN, content=TEXT) == TEXT
    assert parse_signed_data(blob).content is None
    for content, expected in ((TEXT + b"#", errno.EKEYREJECTED), (None, errno.EKEYREJECTED)):
        with pytest.raises(KernelError) as refused:
            verify_pkcs7_signature(blob, PLAIN, content=content)
        assert refused.value.errno == expected
    with pytest.raises(KernelError) as refused:
        verify_pkcs7_signature(signed_data(signer_info(TRUSTED, TEXT), content=TEXT), PLAIN, content=TEXT)
    assert refused.value.errno == errno.EBADMSG


def change_certificate(change: Callable[[list[bytes]], None], who: Identity = EC) -> bytes:
    """Take a certificate's TBSCertificate apart, change it, and sign it again."""
    tbs = bytes(who.certificate.tbs_certificate_bytes)
    header = 4 if tbs[1] == 0x82 else 3
    parts, pos = [], header
    while pos < len(tbs):
        size, start = tbs[pos + 1], pos + 2
        if size > 0x80:
            start += size - 0x80
            size = int.from_bytes(tbs[pos + 2 : start])
        parts.append(tbs[pos : start + size])
        pos = start + size
    change(parts)
    changed = seq(*parts)
    algorithm = seq(oid("1.2.840.10045.4.3.2"))
    return seq(changed, algorithm, tlv(3, b"\0", who.sign(changed)))


VALIDITY, SERIAL, EXTENSIONS = 4, 1, 7
NOT_BEFORE = tlv(0x17, b"250101000000Z")


def test_the_parts_of_a_certificate_are_where_the_tests_think() -> None:
    assert parse_certificate(change_certificate(lambda parts: None)).self_signed


def test_one_time_is_both_ends_of_a_validity() -> None:
    def change(parts: list[bytes]) -> None:
        parts[VALIDITY] = seq(NOT_BEFORE)

    certificate = parse_certificate(change_certificate(change))
    assert certificate.valid_from == certificate.valid_to == 1735689600


@pytest.mark.parametrize("validity", [seq(), indefinite(0x30, NOT_BEFORE), seq(NOT_BEFORE, NOT_BEFORE, NOT_BEFORE)])
def test_other_validities_are_malformed(validity: bytes) -> None:
    def change(parts: list[bytes]) -> None:
        parts[VALIDITY] = validity

    with pytest.raises(KernelError, match="EBADMSG"):
        parse_certificate(change_certificate(change))


def with_akid(value: bytes) -> bytes:
    def change(parts: list[bytes]) -> None:
        extension = seq(oid("2.5.29.35"), tlv(4, value))
        parts[EXTENSIONS:] = [tlv(0xA3, seq(extension))]

    return change_certificate(change)


DIRECTORY = tlv(0xA4, seq(tlv(0x31, seq(oid("2.5.4.3"), tlv(12, b"somebody")))))
ISSUER = seq(tlv(0x31, seq(oid("2.5.4.3"), tlv(12, b"somebody"))))[2:]


@pytest.mark.parametrize(
    ("akid", "authority_id", "authority_skid"),
    [
        (seq(), None, None),
        (seq(tlv(0x80, b"key")), None, b"key"),
        (seq(tlv(0xA1), tlv(0x82, b"\7")), None, None),
        (seq(tlv(0xA1, DIRECTORY), tlv(0x82, b"\7")), b"\7" + ISSUER, None),
        (seq(tlv(0x80, b"key"), tlv(0xA1, DIRECTORY), tlv(0x82, b"\7")), b"\7" + ISSUER, b"key"),
        (seq(tlv(0xA1, tlv(0x81, b"a@b"), tlv(0x86, b"u:"), DIRECTORY), tlv(0x82, b"\7")), b"\7" + ISSUER, None),
        (seq(tlv(0xA1, tlv(0xA0, oid("1.2.3"), tlv(0xA0, tlv(12, b"x")))), tlv(0x82, b"\7")), None, None),
        (seq(tlv(0xA1, tlv(0xA3, tlv(12, b"x")), tlv(0xA5, tlv(0xA1, tlv(12, b"x")))), tlv(0x82, b"\7")), None, None),
        (seq(tlv(0xA1, tlv(0xA5, tlv(0xA0, tlv(12, b"x")), tlv(0xA1, tlv(12, b"x"))))), None, None),
    ],
)
def test_authority_key_identifiers(akid: bytes, authority_id: bytes | None, authority_skid: bytes | None) -> None:
    certificate = parse_certificate(with_akid(akid))
    assert (certificate.authority_id, certificate.authority_skid) == (authority_id, authority_skid)


@pytest.mark.parametrize(
    "akid",
    [
        b"",
        seq(tlv(0xA0, b"key")),
        seq(indefinite(0xA1)),
        seq(tlv(0xA1, tlv(0xA1, b"a@b"))),
        seq(tlv(0xA1, tlv(0x89, b"?"))),
        seq(tlv(0x82, b"\7"), tlv(0x80, b"key")),
    ],
)
def test_malformed_authority_key_identifiers(akid: bytes) -> None:
    with pytest.raises(KernelError, match="EBADMSG"):
        parse_certificate(with_akid(akid))


def test_the_description_is_the_one_in_proc_keys() -> None:
    (trusted, *_) = BUILTIN
    assert trusted.description == trusted.subject_text + b": " + (trusted.skid or b"").hex().encode()


ATTRIBUTE = seq(oid("1.2.3.4"), tlv(0x31, tlv(4)))
LONG_NAME = seq(*[tlv(0x31, seq(oid("2.5.4.3"), tlv(12)))] * 3500)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        pytest.param(signed_data(*[signer_info(EC, TEXT)] * 300, content=TEXT), TEXT, id="signers"),
        pytest.param(
            signed_data(*[signer_info(TRUSTED, TEXT)] * 140, content=TEXT, certificates=TRUSTED.der),
            TEXT,
            id="signers_with_a_certificate",
        ),
        pytest.param(
            signed_data(signer_info(TRUSTED, TEXT), content=TEXT, certificates=EC.der * 150), TEXT, id="certificates"
        ),
        pytest.param(
            signed_data(
                seq(tlv(2, b"\1"), TRUSTED.sid, SHA256, tlv(0xA0, *[ATTRIBUTE] * 4500), TRUSTED.algorithm, tlv(4)),
                content=TEXT,
            ),
            "EBADMSG",
            id="attributes",
        ),
        pytest.param(
            signed_data(signer_info(TRUSTED, TEXT, sid=seq(LONG_NAME, tlv(2, b"\1"))), content=TEXT),
            "ENOKEY",
            id="name",
        ),
        pytest.param(
            wrap(
                tlv(2, b"\1"),
                tlv(0x31, SHA256),
                seq(DATA, tlv(0xA0, b"\x30\x80" * 15000 + bytes(30000))),
                tlv(0x31, signer_info(TRUSTED, TEXT)),
            ),
            "EKEYREJECTED",
            id="nesting",
        ),
    ],
)
def test_much_of_anything_takes_no_time(blob: bytes, expected: bytes | str) -> None:
    assert len(blob) > 35000
    assert answer(blob, PLAIN) == expected
