"""What we sign is what openssl signs, and our own verification takes both."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as ser

from ipe_emu.errors import UserError
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.pkcs7 import MAX_SIZE, parse_signed_data, verify_pkcs7_signature
from ipe_emu.pkcs7.keys import new_test_key
from ipe_emu.pkcs7.sign import DIGESTS, sign_policy
from tests.pkcs7.material import PLAIN, TEXT, answer
from tests.vectors import KEYS

SMIME = ("smime", "-sign", "-noattr", "-nodetach", "-binary", "-outform", "der")


def sign(name: str, text: bytes = TEXT, digest: str = "sha256") -> bytes:
    key, certificate = (KEYS / f"{name}.key").read_bytes(), (KEYS / f"{name}.pem").read_bytes()
    return sign_policy(text, key, certificate, digest=digest)


@pytest.fixture
def openssl() -> str:
    program = shutil.which("openssl")
    assert program, "the openssl program is needed for this test: apt install openssl"
    return program


@pytest.mark.parametrize("name", ["trusted", "ec"])
@pytest.mark.parametrize("digest", DIGESTS)
def test_round_trip(name: str, digest: str) -> None:
    text = TEXT.replace(b"\n", b"\r\n") + bytes(range(256))
    blob = sign(name, text, digest)
    assert verify_pkcs7_signature(blob, PLAIN) == text
    (signer,) = parse_signed_data(blob).signers
    assert signer.hash_name == digest
    assert signer.attributes.signed is None


@pytest.mark.parametrize("digest", DIGESTS)
def test_with_rsa_the_bytes_are_those_of_openssl(openssl: str, tmp_path: Path, digest: str) -> None:
    source = tmp_path / "policy"
    source.write_bytes(TEXT)
    command = [openssl, *SMIME, "-md", digest, "-in", str(source), "-signer", str(KEYS / "trusted.pem")]
    done = subprocess.run([*command, "-inkey", str(KEYS / "trusted.key")], capture_output=True, check=True, timeout=60)
    assert done.stdout == sign("trusted", digest=digest)


def test_openssl_verifies_what_we_sign(openssl: str, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(sign("ec"))
    command = [openssl, "smime", "-verify", "-inform", "der", "-in", str(blob), "-noverify"]
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == TEXT


def test_a_new_key_signs(tmp_path: Path) -> None:
    for kind in ("rsa2048", "ec-p256"):
        key, certificate = new_test_key("New", kind)
        file = tmp_path / kind
        file.write_bytes(certificate)
        blob = sign_policy(TEXT, key, certificate)
        assert answer(blob, Keyrings(builtin=load_certificates([file]))) == TEXT
        assert answer(blob, PLAIN) == "ENOKEY"


def test_the_largest_policy() -> None:
    overhead = len(sign("trusted", b"x" * 64000)) - 64000
    assert len(sign("trusted", b"x" * (MAX_SIZE - overhead))) == MAX_SIZE
    with pytest.raises(UserError, match="shorten the text by 1 bytes"):
        sign("trusted", b"x" * (MAX_SIZE - overhead + 1))


@pytest.mark.parametrize(
    ("key", "certificate", "digest", "reason"),
    [
        ("ec.key", "trusted.pem", "sha256", "does not belong"),
        ("trusted.pem", "trusted.pem", "sha256", "no private key"),
        ("trusted.key", "trusted.key", "sha256", "no certificate"),
        ("trusted.key", "trusted.pem", "md5", "unknown digest 'md5'"),
    ],
)
def test_what_cannot_sign(key: str, certificate: str, digest: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        sign_policy(TEXT, (KEYS / key).read_bytes(), (KEYS / certificate).read_bytes(), digest=digest)


def test_nonsense_and_encrypted_keys() -> None:
    certificate = (KEYS / "trusted.pem").read_bytes()
    for nonsense in (b"", b"\0", b"-----BEGIN PRIVATE KEY-----\n", certificate[:50]):
        with pytest.raises(UserError):
            sign_policy(TEXT, nonsense, certificate)
        with pytest.raises(UserError):
            sign_policy(TEXT, (KEYS / "trusted.key").read_bytes(), nonsense)
    key = ser.load_pem_private_key((KEYS / "trusted.key").read_bytes(), None)
    form = ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.BestAvailableEncryption(b"secret")
    with pytest.raises(UserError, match=r"[Pp]assword"):
        sign_policy(TEXT, key.private_bytes(*form), certificate)
    assert answer(sign_policy(TEXT, key.private_bytes(*form), certificate, password=b"secret"), PLAIN) == TEXT
