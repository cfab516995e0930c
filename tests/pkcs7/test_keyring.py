"""Certificates from files, and how they are found."""

from pathlib import Path

import pytest
from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ipe_emu.errors import KernelError, UserError
from ipe_emu.keyring import MAX_FILE_SIZE, Keyring, Keyrings, load_blacklist, load_certificates
from ipe_emu.pkcs7.keys import new_test_key
from ipe_emu.pkcs7.x509 import Certificate
from tests.pkcs7.der import Identity
from tests.vectors import KEYS

NAMES = ("trusted", "ec", "ca")


def pem(name: str) -> bytes:
    return (KEYS / f"{name}.pem").read_bytes()


def der(name: str) -> bytes:
    return Identity.recorded(name).der


def loaded(*names: str) -> tuple[Certificate, ...]:
    return load_certificates(KEYS / f"{name}.pem" for name in names)


def test_a_bundle_is_what_is_in_it() -> None:
    assert load_certificates([KEYS / "builtin-trusted.pem"]) == loaded(*NAMES)


@pytest.mark.parametrize("join", [b"", b"\n", b"text between\n"])
def test_pem_bundles(tmp_path: Path, join: bytes) -> None:
    file = tmp_path / "bundle"
    file.write_bytes(join.join(pem(name) for name in NAMES))
    assert load_certificates([file]) == loaded(*NAMES)


def test_pem_with_carriage_returns_and_a_private_key(tmp_path: Path) -> None:
    file = tmp_path / "both.pem"
    file.write_bytes((KEYS / "ec.key").read_bytes() + pem("ec").replace(b"\n", b"\r\n"))
    assert load_certificates([file]) == loaded("ec")


def test_der_and_der_bundles(tmp_path: Path) -> None:
    file = tmp_path / "bundle.der"
    file.write_bytes(der("trusted") + der("ec"))
    assert load_certificates([file]) == loaded("trusted", "ec")


def test_directories_and_duplicates(tmp_path: Path) -> None:
    (tmp_path / "b.der").write_bytes(der("trusted"))
    (tmp_path / "a.pem").write_bytes(pem("ec"))
    (tmp_path / "c.pem").write_bytes(pem("trusted"))
    (tmp_path / ".hidden").write_bytes(b"nonsense")
    (tmp_path / "directory").mkdir()
    assert load_certificates([tmp_path, KEYS / "ec.pem"]) == loaded("ec", "trusted")
    assert load_certificates([]) == ()


def ed25519_certificate() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ed")])
    now = x509.load_pem_x509_certificate(pem("ec")).not_valid_before_utc
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
    return builder.sign(key, None).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"hello", "neither PEM nor DER", id="text"),
        pytest.param((KEYS / "ec.key").read_bytes(), "no certificate in it, but .*PRIVATE KEY", id="private_key"),
        pytest.param(pem("ec")[:-40], "cut off", id="pem_cut_off"),
        pytest.param(pem("ec") + pem("ca")[:100], "cut off", id="second_pem_cut_off"),
        pytest.param(pem("ec").replace(b"MII", b"M!I", 1), "base64", id="base64"),
        pytest.param(der("ec")[:-1], "cut off", id="der_cut_off"),
        pytest.param(der("ec") + b"\0", "after 1 certificates, at byte", id="der_and_more"),
        pytest.param(b"\x30\x80" + der("ec")[4:] + b"\0\0", "EBADMSG|cut off", id="indefinite"),
        pytest.param(b"\x30\x03\2\1\1", "does not load this certificate .EBADMSG", id="other_der"),
        pytest.param(b"\x30", "cut off", id="one_byte"),
        pytest.param(ed25519_certificate(), "does not load this certificate .ENOPKG", id="ed25519"),
        pytest.param(b"\x30" * (MAX_FILE_SIZE + 1), "larger than", id="too_large"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "nonsense.pem"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        load_certificates([file])
    assert str(refused.value).startswith(f"{file}: ")
    with pytest.raises(UserError):
        load_blacklist([file])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_certificates([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"null|NUL|invalid"):
        load_certificates([Path("with\0nul")])


def test_a_damaged_self_signature_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "damaged.der"
    file.write_bytes(der("trusted")[:-1] + bytes([der("trusted")[-1] ^ 1]))
    with pytest.raises(UserError, match=r"EINVAL|EBADMSG|EKEYREJECTED"):
        load_certificates([file])


def test_keys_are_found_by_both_identifiers() -> None:
    (trusted,) = loaded("trusted")
    keyring = Keyring([trusted])
    assert trusted.skid is not None
    assert keyring.find(trusted.id) is keyring.find(trusted.skid) is trusted
    assert keyring.find(trusted.skid[4:]) is None
    assert keyring.find(b"") is None


def test_of_two_keys_with_one_description_the_later_stays() -> None:
    (trusted,) = loaded("trusted")
    (ec_key,) = loaded("ec")
    assert len(Keyring([trusted, ec_key, trusted])) == 2


def test_keys_that_share_an_identifier_are_refused() -> None:
    (trusted,) = loaded("trusted")
    (ec_key,) = loaded("ec")
    with pytest.raises(UserError, match="the same identifier"):
        Keyring([trusted, evolve(ec_key, skid=trusted.skid)])


def test_blacklisted_keys_are_in_no_keyring() -> None:
    (trusted,) = loaded("trusted")
    assert trusted.signature.digest is not None
    keyrings = Keyrings(builtin=[trusted], blacklist=frozenset({trusted.signature.digest}))
    assert keyrings.find(keyrings.trusted(), trusted.id) is None
    assert Keyrings(builtin=[trusted]).find((Keyring([trusted]),), trusted.id) is trusted


def test_the_secondary_keyring_is_asked_first() -> None:
    (trusted,) = loaded("trusted")
    keyrings = Keyrings(builtin=loaded("trusted"), secondary=[trusted])
    assert keyrings.find(keyrings.trusted(), trusted.id) is trusted
    assert keyrings.platform is None


def test_an_empty_identifier_is_no_question() -> None:
    with pytest.raises(KernelError, match="EINVAL"):
        Keyrings().find((), b"")


def test_who_vouches_for_secondary_keys() -> None:
    ca, leaf, untrusted = loaded("ca", "leaf", "untrusted")
    assert Keyrings(builtin=[ca], secondary=[leaf, untrusted]).unvouched() == (untrusted,)
    assert Keyrings(secondary=[leaf]).unvouched() == (leaf,)
    assert Keyrings(builtin=[ca], secondary=[ca]).unvouched() == ()


def test_blacklist_files(tmp_path: Path) -> None:
    digest = x509.load_pem_x509_certificate(pem("ec"))
    signed = hashes.Hash(hashes.SHA256())
    signed.update(digest.tbs_certificate_bytes)
    tbs = signed.finalize()
    hash_file = tmp_path / "hashes"
    hash_file.write_text(f'# revoked\n"tbs:{tbs.hex()}",\n\nbin:00ff\ntbs:0102\n')
    assert load_blacklist([hash_file]) == {tbs, b"\1\2"}
    assert load_blacklist([KEYS / "ec.pem"]) == {tbs}
    for bad in ("tbs:0", "tbs:0G", "tbs:", "tbs:" + "00" * 65, "tbs:AB", "tbs:00\nnonsense"):
        hash_file.write_text(bad)
        with pytest.raises(UserError, match=r"no blacklist entry|neither PEM nor DER"):
            load_blacklist([hash_file])


@pytest.mark.parametrize("kind", ["rsa2048", "rsa4096", "ec-p256", "ec-p384"])
def test_new_keys_are_loaded(tmp_path: Path, kind: str) -> None:
    _, certificate = new_test_key("Somebody", kind)
    file = tmp_path / "new.pem"
    file.write_bytes(certificate)
    (new,) = load_certificates([file])
    assert new.self_signed
    assert new.skid == new.authority_skid is not None
    assert new.readable_name == "Somebody"
    assert len(Keyrings(builtin=[new]).builtin) == 1


@pytest.mark.parametrize(
    ("cn", "kind"), [("", "rsa2048"), ("x" * 65, "rsa2048"), ("a\nb", "rsa2048"), ("a", "ed25519")]
)
def test_new_keys_that_cannot_be(cn: str, kind: str) -> None:
    with pytest.raises(UserError):
        new_test_key(cn, kind)
