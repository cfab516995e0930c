"""X.509 certificates as the kernel reads them: those in a keyring and those embedded in a message.

What the kernel does not look at is not looked at here: validity against the clock, CA flags, path
lengths, key usage, critical extensions. What it does look at it takes more strictly than RFC 5280.
"""

import errno
from datetime import date

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7 import ber, digest, oids
from ipe_emu.pkcs7.signature import PublicKey, Signature, public_key_verify_signature


@frozen
class Certificate:
    """One certificate (kernel: ``struct x509_certificate``).

    Identifiers are raw bytes as they stand in the certificate, never normalised.
    """

    der: bytes
    """The whole certificate."""
    id: bytes
    """Content of the serial number followed by content of the issuer's name."""
    skid: bytes | None
    """Subject key identifier."""
    authority_id: bytes | None
    """The issuer by serial number and its issuer's name (``auth_ids[0]``)."""
    authority_skid: bytes | None
    """The issuer by its subject key identifier (``auth_ids[1]``)."""
    issuer: bytes
    subject: bytes
    """Content of the encoded names."""
    subject_text: bytes
    """The subject as the kernel describes it: O and CN, or what there is of them."""
    valid_from: int
    valid_to: int
    """Seconds since 1970."""
    public_key: PublicKey
    signature: Signature
    """What the issuer signed; its digest is the one the blacklist names."""
    self_signed: bool
    """Issuer, subject and key identifiers agree, and the certificate's own key made the signature."""

    @property
    def identifiers(self) -> tuple[bytes, ...]:
        """The identifiers by which a keyring finds the key."""
        return (self.id,) if self.skid is None else (self.id, self.skid)

    @property
    def description(self) -> bytes:
        """The key's description in a keyring, of which there can be one only (``x509_key_preparse``)."""
        serial = self.id[: len(self.id) - len(self.issuer)]
        return self.subject_text.split(b"\0", 1)[0] + b": " + (self.skid or serial).hex().encode()

    @property
    def readable_name(self) -> str:
        """The subject for messages."""
        return self.subject_text.decode("utf-8", "replace") or "(no name)"


def parse_certificate(
    data: bytes, unavailable_hashes: frozenset[str] = frozenset(), *, start: int = 0, end: int | None = None
) -> Certificate:
    """Parse the certificate that begins at ``start`` (bytes that follow it are ignored).

    ``end`` is where the reader has to stop. The signature of a self-signed certificate is checked at once.
    Raises KernelError: EBADMSG, EINVAL, ENOPKG, EKEYREJECTED (``x509_cert_parse``).
    """
    return _Parser(ber.Cursor(data, "certificate", start, end)).parse(unavailable_hashes)


class _Parser:
    """The state of one parse: what is noted until the certificate is complete (``x509_parse_context``)."""

    def __init__(self, cursor: ber.Cursor) -> None:
        self.cursor = cursor
        self.skid: bytes | None = None
        self.raw_akid: bytes | None = None

    def parse(self, unavailable_hashes: frozenset[str]) -> Certificate:
        cursor = self.cursor
        whole_start = cursor.pos
        certificate = cursor.enter(ber.SEQUENCE)

        tbs_start = cursor.pos
        tbs = cursor.enter(ber.SEQUENCE)
        if version := cursor.optional_enter(ber.context_constructed(0)):
            cursor.primitive(ber.INTEGER)
            cursor.leave(version)
        serial = cursor.primitive(ber.INTEGER)
        signature_oid, _ = self._algorithm()
        if signature_oid not in oids.CERTIFICATE_SIGNATURES:
            raise KernelError(
                errno.ENOPKG,
                "a certificate signed with an algorithm the kernel does not have "
                "(it has RSA PKCS#1 v1.5 and ECDSA with SHA-1, SHA-2 and SHA-3)",
                "x509_note_sig_algo",
            )
        algorithm, hash_name = oids.CERTIFICATE_SIGNATURES[signature_oid]
        issuer, _ = self._name()
        valid_from, valid_to = self._validity()
        subject, subject_text = self._name()
        public_key = self._public_key_info()
        cursor.optional_primitive(ber.context(1))
        cursor.optional_primitive(ber.context(2))
        if extensions := cursor.optional_enter(ber.context_constructed(3)):
            self._extensions()
            cursor.leave(extensions)
        content = cursor.leave(tbs)
        # End-of-contents octets are not signed, but the header that announces them is.
        signed = cursor.data[tbs_start : tbs.start] + content

        outer_oid, _ = self._algorithm()
        value = self._signature_value(outer_oid, signature_oid)
        cursor.leave(certificate)
        der = cursor.data[whole_start : cursor.pos]

        authority_id, authority_skid = (None, None) if self.raw_akid is None else _authority(self.raw_akid)
        try:
            signed_digest = digest.compute(hash_name, signed, unavailable_hashes)
        except digest.UnavailableError:
            signed_digest = None
        signature = Signature(value, algorithm, hash_name, signed_digest)
        own_id = serial + issuer
        return Certificate(
            der=der,
            id=own_id,
            skid=self.skid,
            authority_id=authority_id,
            authority_skid=authority_skid,
            issuer=issuer,
            subject=subject,
            subject_text=subject_text,
            valid_from=valid_from,
            valid_to=valid_to,
            public_key=public_key,
            signature=signature,
            self_signed=issuer == subject
            and _names_itself(own_id, self.skid, authority_id, authority_skid)
            and _own_signature_holds(public_key, signature),
        )

    def _algorithm(self) -> tuple[bytes, bytes | None]:
        """Take an AlgorithmIdentifier; return its OID and its encoded parameters."""
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        oid = cursor.primitive(ber.OBJECT_IDENTIFIER)
        element = cursor.optional_anything()
        cursor.leave(frame)
        if element is None:
            return oid, None
        return oid, cursor.data[element.start - element.header : element.end]

    def _name(self) -> tuple[bytes, bytes]:
        """Take a Name; return its content and the text the kernel makes of it."""
        return name(self.cursor)

    def _validity(self) -> tuple[int, int]:
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        valid_from = valid_to = self._time()
        # A Validity that ends after its first Time is accepted, and that one Time is both limits: the decoder
        # skips alternatives at the end of the data and calls x509_note_not_after with what it saw last.
        if not cursor.at_end:
            valid_to = self._time()
        cursor.leave(frame)
        return valid_from, valid_to

    def _time(self) -> int:
        cursor = self.cursor
        tag = cursor.peek()
        if tag not in {ber.UTC_TIME, ber.GENERALIZED_TIME}:
            cursor.malformed("a validity that is neither UTCTime nor GeneralizedTime")
        return decode_time(tag, cursor.primitive(tag))

    def _public_key_info(self) -> PublicKey:
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        oid, parameters = self._algorithm()
        bits = cursor.primitive(ber.BIT_STRING)
        algorithm = oids.KEYS_WITHOUT_CURVE.get(oid)
        if oid == oids.EC_PUBLIC_KEY:
            algorithm = oids.CURVES.get(_named_curve(parameters))
        if algorithm is None:
            raise KernelError(
                errno.ENOPKG,
                "a certificate with a key of a kind the kernel does not have "
                "(it has RSA and the curves P-192, P-256, P-384 and P-521)",
                "x509_extract_key_data",
            )
        if not bits or bits[0] != 0:
            raise _bad("a public key that does not fill whole bytes", "x509_extract_key_data")
        cursor.leave(frame)
        return PublicKey(algorithm, bits[1:])

    def _signature_value(self, outer_oid: bytes, signature_oid: bytes) -> bytes:
        bits = self.cursor.primitive(ber.BIT_STRING)
        if outer_oid != signature_oid:
            raise KernelError(
                errno.EINVAL,
                "a certificate that names one signature algorithm inside and another one beside the signature",
                "x509_note_signature",
            )
        if not bits or bits[0] != 0:
            raise _bad("a certificate signature that does not fill whole bytes", "x509_note_signature")
        return bits[1:]

    def _extensions(self) -> None:
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        more = True
        while more:
            extension = cursor.enter(ber.SEQUENCE)
            oid = cursor.primitive(ber.OBJECT_IDENTIFIER)
            cursor.optional_primitive(ber.BOOLEAN)
            self._extension(oid, cursor.primitive(ber.OCTET_STRING))
            cursor.leave(extension)
            more = cursor.more(frame)
        cursor.leave(frame)

    def _extension(self, oid: bytes, value: bytes) -> None:
        """Note the extensions that count (``x509_process_extension``); critical ones are not told apart."""
        if oid == oids.SUBJECT_KEY_IDENTIFIER:
            if self.skid is not None or len(value) < 3 or value[0] != ber.OCTET_STRING or value[1] != len(value) - 2:
                raise _bad("a subjectKeyIdentifier that is malformed, empty or repeated", "x509_process_extension")
            self.skid = value[2:]
        elif oid == oids.KEY_USAGE:
            if len(value) < 4 or value[0] != ber.BIT_STRING or value[2] >= 8:
                raise _bad("a malformed keyUsage", "x509_process_extension")
        elif oid == oids.AUTHORITY_KEY_IDENTIFIER:
            self.raw_akid = value
        elif oid == oids.BASIC_CONSTRAINTS:
            _check_basic_constraints(value)


def name(cursor: ber.Cursor) -> tuple[bytes, bytes]:
    """Take a Name (SEQUENCE OF SET OF type and value); return its content and its short text.

    The text is for people and for the description of a key (``x509_fabricate_name``).
    """
    parts: dict[bytes, bytes] = {}
    whole = cursor.enter(ber.SEQUENCE)
    more_sets = True
    while more_sets:
        relative = cursor.enter(ber.SET)
        more = True
        while more:
            pair = cursor.enter(ber.SEQUENCE)
            oid = cursor.primitive(ber.OBJECT_IDENTIFIER)
            value = cursor.anything()
            # The kernel keeps the size of a part in one byte.
            parts[oid] = cursor.data[value.start : value.start + (value.end - value.start & 0xFF)]
            cursor.leave(pair)
            more = cursor.more(relative)
        cursor.leave(relative)
        more_sets = cursor.more(whole)
    return cursor.leave(whole), _short_text(parts)


def _short_text(parts: dict[bytes, bytes]) -> bytes:
    common = parts.get(oids.COMMON_NAME, b"")
    organisation = parts.get(oids.ORGANIZATION_NAME, b"")
    if not (common and organisation):
        return common or organisation or parts.get(oids.EMAIL_ADDRESS, b"")
    alike = min(len(common), len(organisation)) >= 7 and common[:7] == organisation[:7]
    return common if common.startswith(organisation) or alike else organisation + b": " + common


def decode_time(tag: int, value: bytes) -> int:
    """Return seconds since 1970 of a UTCTime or GeneralizedTime (``x509_decode_time``).

    Stricter than X.690 (seconds and Z are required; GeneralizedTime not for 1950 to 2049, as RFC 5280
    says) and more lenient (hour 24, second 60). Raises KernelError(EBADMSG).
    """
    digits = value[:-1]
    wanted = {ber.UTC_TIME: 12, ber.GENERALIZED_TIME: 14}.get(tag)
    if len(digits) != wanted or not digits.isdigit() or value[-1:] != b"Z":
        raise _bad("a time that is not written as YYMMDDhhmmssZ or YYYYMMDDhhmmssZ", "x509_decode_time")
    year, rest = int(digits[:-10]), digits[-10:]
    month, day, hour, minute, second = (int(rest[i : i + 2]) for i in range(0, 10, 2))
    if tag == ber.UTC_TIME:
        year += 1900 if year >= 50 else 2000
    elif 1950 <= year <= 2049:
        raise _bad("a GeneralizedTime for a year that UTCTime is for (1950 to 2049)", "x509_decode_time")
    if year < 1970 or hour > 24 or minute > 59 or second > 60:
        raise _bad("a time before 1970, or that is none", "x509_decode_time")
    try:
        days = date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        raise _bad("a time on a day that does not exist", "x509_decode_time") from None
    return ((days * 24 + hour) * 60 + minute) * 60 + second


def _named_curve(parameters: bytes | None) -> bytes:
    """Return the OID in the parameters of an EC key, which must be nothing else (``parse_OID``)."""
    if (
        parameters is None
        or len(parameters) < 3
        or parameters[0] != ber.OBJECT_IDENTIFIER
        or parameters[1] != len(parameters) - 2
    ):
        raise _bad("an EC key that does not name its curve", "x509_extract_key_data")
    return parameters[2:]


def _check_basic_constraints(value: bytes) -> None:
    """Accept an empty SEQUENCE, or one that begins with CA:TRUE; an explicit CA:FALSE is refused."""
    if len(value) < 2 or value[0] != ber.SEQUENCE or value[1] != len(value) - 2:
        raise _bad("malformed basicConstraints", "x509_process_extension")
    if value[1] != 0 and value[2:5] != b"\x01\x01\xff":
        raise _bad("basicConstraints that do not begin with CA:TRUE (CA:FALSE is left out)", "x509_process_extension")


def _authority(raw: bytes) -> tuple[bytes | None, bytes | None]:
    """Decode an authorityKeyIdentifier; return the issuer by serial and name, and by key identifier."""
    cursor = ber.Cursor(raw, "authorityKeyIdentifier")
    frame = cursor.enter(ber.SEQUENCE)
    key_id = cursor.optional_primitive(ber.context(0))
    issuer = None
    if names := cursor.optional_enter(ber.context_constructed(1)):
        # An empty list of names is taken; the decoder's alternatives are skipped at the end of the data.
        more = not cursor.at_end
        while more:
            directory_name = _general_name(cursor)
            issuer = issuer if directory_name is None else directory_name
            more = cursor.more(names)
        cursor.leave(names)
    serial = cursor.optional_primitive(ber.context(2))
    cursor.leave(frame)
    authority_id = None if serial is None or issuer is None else serial + issuer
    return authority_id, key_id


def _general_name(cursor: ber.Cursor) -> bytes | None:
    """Take one GeneralName (RFC 5280, 4.2.1.6); return the content of a directoryName."""
    tag = cursor.peek()
    if tag in {ber.context(n) for n in (1, 2, 6, 7, 8)}:
        cursor.primitive(tag)
        return None
    number = (tag | ber.CONSTRUCTED) - ber.context_constructed(0)
    if number not in {0, 3, 4, 5}:
        cursor.malformed("an unknown kind of name")
    content = None
    frame = cursor.enter(ber.context_constructed(number))
    if number == 0:
        cursor.primitive(ber.OBJECT_IDENTIFIER)
        _explicit_anything(cursor, 0)
    elif number == 3:
        cursor.anything()
    elif number == 4:
        content, _ = name(cursor)
    else:
        if assigner := cursor.optional_enter(ber.context_constructed(0)):
            cursor.anything()
            cursor.leave(assigner)
        _explicit_anything(cursor, 1)
    cursor.leave(frame)
    return content


def _explicit_anything(cursor: ber.Cursor, number: int) -> None:
    frame = cursor.enter(ber.context_constructed(number))
    cursor.anything()
    cursor.leave(frame)


def _names_itself(own_id: bytes, skid: bytes | None, authority_id: bytes | None, authority_skid: bytes | None) -> bool:
    """Return whether a self-issued certificate's authority is itself (``x509_check_for_self_signed``)."""
    if authority_id is None and authority_skid is None:
        return True
    by_skid = skid is not None and skid == authority_skid
    by_id = own_id == authority_id
    if by_skid != by_id and authority_id is not None and authority_skid is not None:
        raise KernelError(
            errno.EKEYREJECTED,
            "a self-issued certificate whose authorityKeyIdentifier matches it in one half only",
            "x509_check_for_self_signed",
        )
    return by_skid or by_id


def _own_signature_holds(key: PublicKey, signature: Signature) -> bool:
    """Check a self-signature. With an unavailable hash it cannot be checked, which is no fault."""
    if signature.digest is None:
        return False
    public_key_verify_signature(key, signature)
    return True


def _bad(reason: str, function: str) -> KernelError:
    return KernelError(errno.EBADMSG, reason, function)
