"""The kernel's keyrings of certificates, and reading them from files.

A key is found by its identifiers as raw bytes, never normalised: id 0 is the serial number followed by
the issuer's name, id 1 the subject key identifier.
"""

import base64
import binascii
import errno
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from attrs import evolve, field, frozen

from ipe_emu.errors import KernelError, UserError, errno_name
from ipe_emu.pkcs7.restrict import restrict_link_by_signature
from ipe_emu.pkcs7.x509 import Certificate, parse_certificate

MAX_FILE_SIZE = 8 << 20
"""Bytes of the largest file that is read for certificates; a distribution's whole CA bundle has a quarter of that."""

MAX_CERTIFICATES = 10_000
"""Certificates taken from all the files of one keyring."""


class Keyring:
    """Certificates that may be looked up by identifier (kernel: a keyring of asymmetric keys).

    Of two certificates with the same description (subject and key identifier) the later replaces the
    earlier, as when a key is added. UserError if two that remain share an identifier and have different
    keys: which of them a kernel finds depends on the order of its memory.
    """

    def __init__(self, certificates: Iterable[Certificate] = ()) -> None:
        self.certificates = tuple({cert.description: cert for cert in certificates}.values())
        self._by_id: dict[bytes, Certificate] = {}
        for cert in self.certificates:
            for identifier in cert.identifiers:
                known = self._by_id.setdefault(identifier, cert)
                if (known.public_key, known.skid) != (cert.public_key, cert.skid):
                    raise UserError(
                        f"the certificates {known.readable_name!r} and {cert.readable_name!r} have the same identifier "
                        f"{identifier.hex()} but are different keys: which one a kernel uses is left to chance"
                    )

    def find(self, identifier: bytes) -> Certificate | None:
        """Return the certificate one of whose two identifiers is ``identifier``."""
        return self._by_id.get(identifier)

    def __len__(self) -> int:
        return len(self.certificates)

    def __repr__(self) -> str:
        return f"Keyring({[cert.readable_name for cert in self.certificates]})"


def _keyring(value: "Keyring | Iterable[Certificate]") -> Keyring:
    return value if isinstance(value, Keyring) else Keyring(value)


def _optional_keyring(value: "Keyring | Iterable[Certificate] | None") -> Keyring | None:
    return None if value is None else _keyring(value)


@frozen
class Keyrings:
    """All keyrings a signature can meet (certs/system_keyring.c, certs/blacklist.c, dm-verity's, fs-verity's).

    Give tuples of certificates as ``load_certificates`` returns them.
    """

    builtin: Keyring = field(factory=Keyring, converter=_keyring)
    secondary: Keyring = field(factory=Keyring, converter=_keyring)
    """Looked up before ``builtin``, which is linked into it."""
    platform: Keyring | None = field(default=None, converter=_optional_keyring)
    """None where the kernel has none; otherwise asked with a verification of its own."""
    blacklist: frozenset[bytes] = frozenset()
    """Digests of the signed part of certificates (``tbs:`` entries)."""
    revocation: Keyring = field(factory=Keyring, converter=_keyring)
    """Certificates in the blacklist keyring (``CONFIG_SYSTEM_REVOCATION_KEYS``)."""
    dm_verity: Keyring = field(factory=Keyring, converter=_keyring)
    """Asked for signatures of root hashes alone, after all others; empty where the kernel has none (before 7.0)."""
    fsverity: Keyring = field(factory=Keyring, converter=_keyring)
    """The only one that is asked for signatures of fs-verity digests."""
    ipe: Keyring = field(factory=Keyring, converter=_keyring)
    """For policies alone, asked before ``platform``; op-policy's, and empty when a machine boots."""

    def __attrs_post_init__(self) -> None:
        for where in (self.builtin, self.revocation):
            for cert in where.certificates:
                # x509_load_certificate_list stops at anything else, and what follows is not loaded.
                if cert.der[:2] != b"\x30\x82":
                    raise UserError(
                        f"the certificate {cert.readable_name!r} is shorter than 256 bytes: a kernel does not load it, "
                        "nor those after it, from the list that is compiled in"
                    )

    def trusted(self) -> tuple[Keyring, ...]:
        """Return what stands for the secondary keyring, in the order of search."""
        return (self.secondary, self.builtin)

    def for_root_hashes(self) -> "Keyrings":
        """Return what dm-verity asks, but for its own keyring."""
        return evolve(self, ipe=Keyring())

    def alone(self, keyring: Keyring) -> "Keyrings":
        """Return a set in which ``keyring`` alone is trusted; what was taken back stays so."""
        return Keyrings(secondary=keyring, blacklist=self.blacklist, revocation=self.revocation)

    def is_blacklisted(self, certificate: Certificate) -> bool:
        """Return whether a certificate is on the blacklist; such a key cannot be in a keyring either."""
        return certificate.signature.digest in self.blacklist

    def find(self, where: tuple[Keyring, ...], identifier: bytes) -> Certificate | None:
        """Return the first certificate with this identifier in the given keyrings.

        Raises ``KernelError(EINVAL)`` for an identifier of zero length (``asymmetric_key_hex_to_key_id``).
        """
        if not identifier:
            raise KernelError(
                errno.EINVAL,
                "a signer or issuer is named by an identifier of zero length",
                "asymmetric_key_hex_to_key_id",
            )
        for keyring in where:
            cert = keyring.find(identifier)
            if cert is not None and not self.is_blacklisted(cert):
                return cert
        return None

    def unvouched(self) -> tuple[Certificate, ...]:
        """Return the secondary keys that no other key of builtin and secondary has signed.

        A kernel refuses to add those to the secondary keyring (``restrict_link_by_signature``), unless they
        are machine owner keys, which are linked into it from elsewhere.
        """
        return tuple(cert for cert in self.secondary.certificates if not self._vouched(cert))

    def _vouched(self, certificate: Certificate) -> bool:
        if certificate in self.builtin.certificates:
            return True
        others = Keyring(cert for cert in self.secondary.certificates if cert is not certificate)
        try:
            restrict_link_by_signature(certificate, self, (others, self.builtin))
        except KernelError:
            return False
        return True


_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----([^-]*)-----END \1-----")
_CERTIFICATE_LABELS = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE"})


def load_certificates(paths: Iterable[Path]) -> tuple[Certificate, ...]:
    """Read certificates from PEM or DER files, bundles of either, and directories of such files.

    In a directory every regular file counts whose name does not begin with a dot. The same certificate
    given twice counts once. Raises UserError naming the file and what is wrong with it, also for
    certificates that a kernel does not load.
    """
    found: dict[bytes, Certificate] = {}
    for path in paths:
        for file in _files(Path(path)):
            for der in _split(_read(file), file):
                found.setdefault(der, _parse(der, file))
                if len(found) > MAX_CERTIFICATES:
                    raise UserError(f"{file}: more than {MAX_CERTIFICATES} certificates")
    return tuple(found.values())


_HASH_LINE = re.compile(r'"?(tbs|bin):([0-9a-f]{2,128})"?,?')


def load_blacklist(paths: Iterable[Path]) -> frozenset[bytes]:
    """Read blacklist entries: files of ``tbs:HEX`` lines, or certificates, whose own hash is taken.

    Lines are as in ``CONFIG_SYSTEM_BLACKLIST_HASH_LIST`` (quotes and commas may stand there), empty, or
    comments after ``#``. ``bin:`` entries are about other things than certificates and are skipped.
    """
    entries: set[bytes] = set()
    for path in paths:
        for file in _files(Path(path)):
            data = _read(file)
            text = data.decode("ascii", "replace") if b"\0" not in data else ""
            lines = [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]
            if lines and all(line.lstrip('"')[:4] in {"tbs:", "bin:"} for line in lines):
                entries |= _hash_lines(lines, file)
                continue
            for der in _split(data, file):
                signed_digest = _parse(der, file).signature.digest
                if signed_digest is not None:
                    entries.add(signed_digest)
    return frozenset(entries)


def _hash_lines(lines: list[str], file: Path) -> set[bytes]:
    entries = set()
    for line in lines:
        match = _HASH_LINE.fullmatch(line)
        if match is None or len(match[2]) % 2:
            raise UserError(f"{file}: {line[:80]!r} is no blacklist entry (tbs: and hexadecimal digits in lower case)")
        if match[1] == "tbs":
            entries.add(bytes.fromhex(match[2]))
    return entries


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            return sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return [path]


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            if stat.S_ISDIR(file.stat().st_mode):
                raise UserError(f"{file}: a directory inside a directory of certificates")
            data = stream.read(MAX_FILE_SIZE + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_SIZE:
        raise UserError(f"{file}: larger than {MAX_FILE_SIZE >> 20} MiB, which is no file of certificates")
    return data


def _split(data: bytes, file: Path) -> list[bytes]:
    """Cut a file into encoded certificates."""
    if b"-----BEGIN " in data:
        return _split_pem(data, file)
    if not data:
        raise UserError(f"{file}: the file is empty")
    if data[:1] != b"\x30":
        raise UserError(f"{file}: neither PEM nor DER: no certificate in it")
    return _split_der(data, file)


def _split_pem(data: bytes, file: Path) -> list[bytes]:
    found: list[bytes] = []
    other: set[str] = set()
    for match in _PEM_BLOCK.finditer(data):
        if match[1] not in _CERTIFICATE_LABELS:
            other.add(match[1].decode())
            continue
        try:
            found.append(base64.b64decode(b"".join(match[2].split()), validate=True))
        except binascii.Error as error:
            raise UserError(f"{file}: certificate {len(found) + 1} is not valid base64: {error}") from error
    if len(found) != len(re.findall(rb"-----BEGIN (?:X509 )?CERTIFICATE-----", data)):
        raise UserError(f"{file}: a certificate that is cut off (BEGIN without its END)")
    if not found:
        raise UserError(f"{file}: no certificate in it" + (f", but {', '.join(sorted(other))}" if other else ""))
    return found


def _split_der(data: bytes, file: Path) -> list[bytes]:
    found: list[bytes] = []
    pos = 0
    while pos < len(data):
        length, header = data[pos + 1 : pos + 2], 2
        size = length[0] if length else 0
        if size in {0x81, 0x82}:
            header += size - 0x80
            size = int.from_bytes(data[pos + 2 : pos + header])
        elif size >= 0x80:
            size = len(data)
        end = pos + header + size
        if data[pos] != 0x30 or end > len(data):
            where = f"after {len(found)} certificates, " if found else ""
            raise UserError(f"{file}: {where}at byte {pos}: not a DER certificate, or one that is cut off")
        found.append(data[pos:end])
        pos = end
    return found


def _parse(der: bytes, file: Path) -> Certificate:
    try:
        certificate = parse_certificate(der)
    except KernelError as error:
        raise UserError(
            f"{file}: a kernel does not load this certificate ({errno_name(error.errno)}): {error.reason}"
        ) from error
    if len(certificate.der) != len(der):
        raise UserError(f"{file}: {len(der) - len(certificate.der)} bytes too many after the certificate")
    return certificate
