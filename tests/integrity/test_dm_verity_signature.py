"""Signatures of root hashes, made as dm-verity's users make them, and by whom a kernel lets them be made."""

import random
import subprocess
from pathlib import Path

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.integrity.dm_verity.signature import MAX_SIGNATURE_SIZE, verify_root_hash
from ipe_emu.keyring import Keyring, Keyrings, load_certificates
from tests.vectors import KEYS

ROOT_HASH = bytes(range(32))
TEXT = ROOT_HASH.hex().encode()


def sign(place: Path, content: bytes, name: str = "trusted", *options: str) -> bytes:
    (place / "content").write_bytes(content)
    subprocess.run(
        ["openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-outform", "der", *options,
         "-in", place / "content", "-inkey", KEYS / f"{name}.key", "-signer", KEYS / f"{name}.pem",
         "-out", place / "signature"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return (place / "signature").read_bytes()


def keyring(*names: str) -> Keyring:
    return Keyring(load_certificates([KEYS / f"{name}.pem" for name in names]))


def verdict(signature: bytes, keyrings: Keyrings, root_hash: bytes = ROOT_HASH) -> str:
    try:
        verify_root_hash(root_hash, signature, keyrings)
    except KernelError as error:
        return error.name
    return "good"


@pytest.mark.parametrize("name", ["trusted", "ec"])
def test_each_keyring_is_asked(tmp_path: Path, name: str) -> None:
    signature = sign(tmp_path, TEXT, name)
    ours, nobody = keyring(name), Keyring()
    assert verdict(signature, Keyrings(secondary=ours)) == "good"
    assert verdict(signature, Keyrings(platform=ours)) == "good"
    assert verdict(signature, Keyrings(dm_verity=ours)) == "good"
    assert verdict(signature, Keyrings(platform=nobody, dm_verity=ours)) == "good"
    assert verdict(signature, Keyrings(builtin=load_certificates([KEYS / "builtin-trusted.pem"]))) == "good"
    assert verdict(signature, Keyrings()) == "ENOKEY"
    assert verdict(signature, Keyrings(dm_verity=nobody)) == "ENOKEY"
    assert verdict(signature, Keyrings(secondary=keyring("untrusted"), dm_verity=keyring("untrusted"))) == "ENOKEY"


@pytest.mark.parametrize(
    "content",
    [TEXT + b"\n", TEXT.upper(), ROOT_HASH, b"sha256:" + TEXT, TEXT[:-1], b"", bytes(32).hex().encode()],
)
def test_a_signature_over_something_else(tmp_path: Path, content: bytes) -> None:
    signature = sign(tmp_path, content)
    assert verdict(signature, Keyrings(secondary=keyring("trusted"))) == "EKEYREJECTED"
    assert verdict(signature, Keyrings(dm_verity=keyring("trusted"))) == "EKEYREJECTED"


def test_a_signature_of_another_image(tmp_path: Path) -> None:
    signature = sign(tmp_path, TEXT)
    assert verdict(signature, Keyrings(secondary=keyring("trusted")), root_hash=bytes(32)) == "EKEYREJECTED"


def test_a_signature_that_is_not_detached(tmp_path: Path) -> None:
    signature = sign(tmp_path, TEXT, "trusted", "-nodetach")
    assert verdict(signature, Keyrings(secondary=keyring("trusted"))) == "EBADMSG"


@pytest.mark.parametrize("size", [0, MAX_SIGNATURE_SIZE + 1])
def test_a_signature_that_no_key_carries(size: int) -> None:
    assert verdict(bytes(size), Keyrings(secondary=keyring("trusted"))) == "EINVAL"


def test_the_blacklist_counts_for_the_own_keyring_too(tmp_path: Path) -> None:
    signature = sign(tmp_path, TEXT)
    digest = load_certificates([KEYS / "trusted.pem"])[0].signature.digest
    assert digest is not None
    assert verdict(signature, Keyrings(blacklist=frozenset({digest}), dm_verity=keyring("trusted"))) == "ENOKEY"


def test_single_bits_of_the_signature(tmp_path: Path) -> None:
    """Those of the RSA value all count; of the rest a kernel skips some, and none makes another hash good."""
    signature = sign(tmp_path, TEXT)
    keyrings = Keyrings(secondary=keyring("trusted"))
    rng = random.Random()
    value_starts = len(signature) - 256
    for bit in rng.sample(range(value_starts * 8, len(signature) * 8), 300):
        tampered = (int.from_bytes(signature) ^ 1 << len(signature) * 8 - 1 - bit).to_bytes(len(signature))
        assert verdict(tampered, keyrings) != "good", f"bit {bit}"
    for bit in rng.sample(range(len(signature) * 8), 300):
        tampered = (int.from_bytes(signature) ^ 1 << len(signature) * 8 - 1 - bit).to_bytes(len(signature))
        assert verdict(tampered, keyrings, root_hash=bytes(32)) != "good", f"bit {bit}"
