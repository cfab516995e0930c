"""Files sealed by fs-verity for decisions: the files of the initramfs again, sealed in several ways, and unsealed.

A kernel has them on an ext4 image, the emulator by ``run --sealable``; the driver seals them on both (media.py).
"""

import base64
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ipe_emu.integrity import fsverity
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.fsverity_signature import formatted_digest
from ipe_emu.pkcs7.sign import sign_detached
from tests.conformance import files
from tests.conformance.media import CERTIFICATE, IMAGE, SEALABLE, SEALS, SECONDS
from tests.vectors import KEYS

UNSEALED = "unsealed"
#: Whose certificate is in the keyring .fs-verity.
TRUSTED = KEYS / "trusted.pem"


@frozen
class Kind:
    """How files are sealed; ``signer`` has a key of the tests' (tests/vectors/keys), or nobody has signed."""

    name: str
    algorithm: str = "sha256"
    signer: str | None = None
    block_size: int = fsverity.DEFAULT_BLOCK_SIZE
    salt: bytes = b""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("sha256"), Kind("sha256s", signer="trusted"), Kind("sha512", "sha512"),
        Kind("sha512s", "sha512", signer="trusted"), Kind("salted", block_size=1024, salt=b"salt"),
    )
}  # fmt: skip


@files.once
def _directory() -> Path:
    directory = files.kept("seals")
    fill(directory / "files")
    return directory


def fill(directory: Path) -> None:
    """Make the directory's files, none of them sealed as yet."""
    for name in (*KINDS, UNSEALED):
        files.fill(directory / "layers" / name)
    (directory / "new").mkdir()


@functools.cache
def digest(kind: str, name: str) -> Digest:
    """The digest of one of the files, sealed in one of the ways."""
    how = KINDS[kind]
    with (_directory() / "files/layers" / kind / "bin" / name).open("rb") as file:
        return fsverity.measure(file.fileno(), how.algorithm, block_size=how.block_size, salt=how.salt)


@functools.cache
def signature(signer: str, kind: str, name: str) -> bytes:
    """Somebody's builtin signature of it."""
    key, certificate = ((KEYS / f"{signer}.{suffix}").read_bytes() for suffix in ("key", "pem"))
    return sign_detached(formatted_digest(digest(kind, name)), key, certificate)


def argument(kind: str, signed: bytes = b"") -> dict[str, Any]:
    """What FS_IOC_ENABLE_VERITY is told, as the driver takes it."""
    how = KINDS[kind]
    return {
        "algorithm": fsverity.HASH_ALGORITHMS[how.algorithm],
        "block": how.block_size,
        "salt": how.salt.decode(),
        "signature": base64.b64encode(signed).decode(),
    }


def write(work: Path, *, image: bool) -> None:
    """Tell the driver which files to seal and how; with ``image``, put a file system beside that."""
    steps = [
        {"file": f"{SEALABLE}/layers/{kind.name}/bin/{name}"}
        | argument(kind.name, signature(kind.signer, kind.name, name) if kind.signer else b"")
        for kind in KINDS.values()
        for name in files.NAMES
    ]
    (work / SEALS).write_text(json.dumps(steps))
    if image:
        certificate = x509.load_pem_x509_certificate(TRUSTED.read_bytes())
        (work / CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.DER))
        subprocess.run(["cp", "--sparse=always", _image(), work / IMAGE], check=True, timeout=SECONDS)


@files.once
def _image() -> Path:
    image = _directory() / IMAGE
    command: list[str | Path]
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", "-d", _directory() / "files", image, "64M"]
    subprocess.run(command, check=True, timeout=SECONDS, capture_output=True)
    return image
