"""What is written to nodes, described so that it can be made again for another number, shrunk and printed.

A payload is a JSON object: ``literal`` (Latin-1), or ``text`` (a policy) with who signs it and how, and with
``mutate``, what is then done to the octets. In a text ``{base}`` stands for the sequence's number, ``{dmv}`` for a
volume's root hash, ``{KIND FILE}`` for the digest of a sealed file, ``{NAME:KIND FILE}`` for the same under another
algorithm's name.
"""

import functools
import re
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs7

from tests.conformance import seals, volumes
from tests.vectors import KEYS

Payload = dict[str, Any]

SIGNERS = ("trusted", "ec", "ca", "leaf", "untrusted")
DIGESTS: dict[str, type[hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
    "sha224": hashes.SHA224,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
_ROOT_HASH = re.compile(r"\{(dmv\w*)\}")
_FILE_DIGEST = re.compile(r"\{(?:(\w+):)?(\w+) (\w+)\}")


@functools.cache
def _signer(name: str) -> tuple[x509.Certificate, pkcs7.PKCS7PrivateKeyTypes]:
    certificate = x509.load_pem_x509_certificate((KEYS / f"{name}.pem").read_bytes())
    key = serialization.load_pem_private_key((KEYS / f"{name}.key").read_bytes(), None)
    return certificate, key  # type: ignore[return-value]  # a list of one kind


def octets(payload: Payload, base: int) -> bytes:
    """Make the octets of a payload for one sequence."""
    if "literal" in payload:
        data = str(payload["literal"]).encode("latin-1")
    else:
        data = _filled_in(str(payload["text"]).replace("{base}", str(base))).encode("latin-1")
        if payload.get("pad"):
            data += b"#" * (payload["pad"] - 1) + b"\n"
        if "signer" in payload:
            data = _sign(data, payload)
    for mutation in payload.get("mutate", ()):
        data = _mutated(data, mutation)
    return data


def _filled_in(text: str) -> str:
    """The text with what depends on the files of this machine."""
    text = _ROOT_HASH.sub(lambda found: volumes.root_hash(found[1]), text)
    return _FILE_DIGEST.sub(_file_digest, text)


def _file_digest(found: re.Match[str]) -> str:
    name, kind, file = found.groups()
    digest = seals.digest(kind, file)
    return str(digest) if name is None else f"{name}:{digest.value.hex()}"


@functools.lru_cache(maxsize=4096)
def _signed(text: bytes, signer: str, digest: str, options: tuple[pkcs7.PKCS7Options, ...], more: str | None) -> bytes:
    certificate, key = _signer(signer)
    builder = pkcs7.PKCS7SignatureBuilder().set_data(text).add_signer(certificate, key, DIGESTS[digest]())
    if more:
        builder = builder.add_certificate(_signer(more)[0])
    return builder.sign(serialization.Encoding.DER, list(options))


def _sign(text: bytes, payload: Payload) -> bytes:
    options = [pkcs7.PKCS7Options.Binary]
    if not payload.get("attributes"):
        options.append(pkcs7.PKCS7Options.NoAttributes)
    if payload.get("detached"):
        options.append(pkcs7.PKCS7Options.DetachedSignature)
    if payload.get("no_certificates"):
        options.append(pkcs7.PKCS7Options.NoCerts)
    return _signed(text, payload["signer"], payload.get("digest", "sha256"), tuple(options), payload.get("certificate"))


def _mutated(data: bytes, mutation: list[Any]) -> bytes:
    """Change octets at a place given as a fraction of the length, so that it can be done to any payload."""
    kind, fraction, value = mutation
    at = min(int(fraction * len(data)), max(len(data) - 1, 0))
    match kind:
        case "set":
            return data[:at] + bytes([value]) + data[at + 1 :]
        case "flip":
            return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :] if data else data
        case "insert":
            return data[:at] + bytes([value]) + data[at:]
        case "cut":
            return data[:at] + data[at + value :]
        case "double":
            return data[:at] + data[at : at + value] + data[at:]
        case "truncate":
            return data[:at]
        case "append":
            return data + bytes([value]) * 3
    raise AssertionError(kind)
