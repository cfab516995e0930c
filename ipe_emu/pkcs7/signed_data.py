"""SignedData (RFC 5652, section 5; RFC 2315, section 9) as the kernel parses it.

The first fault in the order of the bytes decides: a SignerInfo with an unknown digest before a malformed
tail is ENOPKG, the other way round EBADMSG.
"""

import errno

from attrs import evolve, frozen

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7 import ber, oids
from ipe_emu.pkcs7.x509 import Certificate, decode_time, name, parse_certificate

MAX_SIZE = 65535
"""Bytes of the largest message: the kernel's ASN.1 decoder counts in 16 bits."""


@frozen
class Attributes:
    """What is kept of signed attributes (kernel: ``struct pkcs7_signed_info``)."""

    present: frozenset[bytes] = frozenset()
    """OIDs of the known attributes seen."""
    message_digest: bytes | None = None
    signing_time: int | None = None
    signed: bytes | None = None
    """The attributes as they are hashed, with the tag of a SET.

    None where there are none, and for the [2] form: that is parsed, and its signing time counts, but
    the signature is over the content (the decoder calls ``pkcs7_sig_note_set_of_authattrs`` for [0] only).
    """


@frozen
class SignerInfo:
    """One signature and whose it is said to be."""

    index: int
    """Counts from 1, for messages."""
    id: bytes
    """Serial number and issuer's name, or a subject key identifier: raw bytes, one kind not told from the other."""
    hash_name: str
    algorithm: str
    value: bytes
    attributes: Attributes


@frozen
class SignedData:
    """A parsed message (kernel: ``struct pkcs7_message``)."""

    content_type: bytes
    content: bytes | None
    """None if detached."""
    certificates: tuple[Certificate, ...]
    signers: tuple[SignerInfo, ...]


def parse_signed_data(blob: bytes, unavailable_hashes: frozenset[str] = frozenset()) -> SignedData:
    """Parse a ContentInfo that holds SignedData; what follows it is ignored.

    ``unavailable_hashes`` are hashes the emulated kernel lacks, by its names (``sm3``, ``streebog256``).
    Raises KernelError: EMSGSIZE, EBADMSG, EINVAL, ENOPKG, EKEYREJECTED (``pkcs7_parse_message``).
    """
    if len(blob) > MAX_SIZE:
        raise KernelError(
            errno.EMSGSIZE,
            f"signed data of {len(blob)} bytes; {MAX_SIZE} is the most a kernel takes",
            "asn1_ber_decoder",
        )
    message = _Parser(blob, unavailable_hashes).parse()
    if not message.signers:
        raise KernelError(errno.EINVAL, "signed data without any signer", "pkcs7_check_authattrs")
    if len({signer.attributes.signed is None for signer in message.signers}) > 1:
        raise KernelError(errno.EINVAL, "some signers with signed attributes and some without", "pkcs7_check_authattrs")
    return message


_DATA_TYPES = frozenset({oids.DATA, oids.MS_INDIRECT_DATA})

_KNOWN_ATTRIBUTES = {
    oids.CONTENT_TYPE: "contentType",
    oids.SIGNING_TIME: "signingTime",
    oids.MESSAGE_DIGEST: "messageDigest",
    oids.SMIME_CAPABILITIES: "smimeCapabilities",
    oids.MS_SP_OPUS_INFO: "SpOpusInfo",
    oids.MS_STATEMENT_TYPE: "SpStatementType",
}


class _Parser:
    """The state of one parse, some of which passes from one SignerInfo to the next (``pkcs7_parse_context``)."""

    def __init__(self, blob: bytes, unavailable_hashes: frozenset[str]) -> None:
        self.cursor = ber.Cursor(blob, "signed data")
        self.unavailable_hashes = unavailable_hashes
        self.content_type = b""
        self.version = 0
        self.signers: list[SignerInfo] = []
        # A version 1 SignerInfo that names its signer by key identifier uses the issuer and serial number
        # of the SignerInfo before it, or none at all; a version 3 one likewise the key identifier.
        self.issuer_id = b""
        self.key_id = b""

    def parse(self) -> SignedData:
        cursor = self.cursor
        outer = cursor.enter(ber.SEQUENCE)
        if cursor.primitive(ber.OBJECT_IDENTIFIER) != oids.SIGNED_DATA:
            raise KernelError(errno.EINVAL, "a PKCS#7 message that is not signedData", "pkcs7_check_content_type")
        explicit = cursor.optional_enter(ber.context_constructed(0))
        if explicit is None:
            cursor.leave(outer)
            return SignedData(b"", None, (), ())
        message = self._signed_data()
        cursor.leave(explicit)
        cursor.leave(outer)
        return message

    def _signed_data(self) -> SignedData:
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        self.version = self._version("SignedData", "pkcs7_note_signeddata_version")
        self._digest_algorithms()
        content = self._content_info()
        certificates = self._certificates()
        self._revocation_lists()
        signer_infos = cursor.optional_enter(ber.SET, ber.SEQUENCE)
        if signer_infos is not None:
            more = True
            while more:
                self._signer_info()
                more = cursor.more(signer_infos)
            cursor.leave(signer_infos)
        elif not cursor.at_end:
            cursor.malformed("signerInfos that are neither SET nor SEQUENCE")
        cursor.leave(frame)
        return SignedData(self.content_type, content, certificates, tuple(self.signers))

    def _version(self, of: str, function: str) -> int:
        value = self.cursor.primitive(ber.INTEGER)
        if value not in {b"\x01", b"\x03"}:
            raise KernelError(errno.EINVAL, f"a {of} whose version is neither 1 nor 3", function)
        return value[0]

    def _digest_algorithms(self) -> None:
        """Take the list of digest algorithms, which decides nothing."""
        cursor = self.cursor
        frame = cursor.optional_enter(ber.SET, ber.SEQUENCE)
        if frame is None:
            cursor.malformed("digestAlgorithms are missing")
        more = True
        while more:
            self._algorithm()
            more = cursor.more(frame)
        cursor.leave(frame)

    def _algorithm(self) -> bytes:
        """Take an AlgorithmIdentifier and return its OID; parameters are not looked at."""
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        oid = cursor.primitive(ber.OBJECT_IDENTIFIER)
        cursor.optional_anything()
        cursor.leave(frame)
        return oid

    def _content_info(self) -> bytes | None:
        """Take the inner ContentInfo and return the content of its only element, whatever its tag."""
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        self.content_type = cursor.primitive(ber.OBJECT_IDENTIFIER)
        content = None
        if explicit := cursor.optional_enter(ber.context_constructed(0)):
            element = cursor.anything()
            content = cursor.data[element.start : element.end]
            cursor.leave(explicit)
        cursor.leave(frame)
        if self.content_type not in _DATA_TYPES:
            raise KernelError(
                errno.EINVAL, "signed data whose content is of another type than data", "pkcs7_note_content"
            )
        if content is None and frame.indefinite and cursor.at_end:
            # Only here does a message without signerInfos fail in the decoder, and not for having no signer:
            # the last thing it saw was an alternative that did not match.
            cursor.malformed("signerInfos are missing")
        return content

    def _certificates(self) -> tuple[Certificate, ...]:
        """Take the certificates: ``[0]`` (which may be empty) or ``[2]`` (which may not)."""
        cursor = self.cursor
        empty_allowed = ber.context_constructed(0)
        frame = cursor.optional_enter(empty_allowed, ber.context_constructed(2))
        if frame is None:
            return ()
        found = []
        more = not (cursor.at_end and not frame.indefinite and frame.tag | ber.CONSTRUCTED == empty_allowed)
        while more:
            found.append(self._certificate())
            more = cursor.more(frame)
        cursor.leave(frame)
        return tuple(found)

    def _certificate(self) -> Certificate:
        cursor = self.cursor
        element = cursor.anything()
        if element.tag != ber.SEQUENCE:
            raise KernelError(
                errno.EBADMSG, "something else than an X.509 certificate among the certificates", "pkcs7_extract_cert"
            )
        start = element.start - element.header
        end = element.end
        if cursor.data[start + 1] == ber.INDEFINITE:
            # Here the kernel makes room for end-of-contents octets that it has counted already.
            end = min(end + 2, len(cursor.data))
        return parse_certificate(cursor.data, self.unavailable_hashes, start=start, end=end)

    def _revocation_lists(self) -> None:
        """Take CRLs, which the kernel's grammar says are lists of certificates: real ones are malformed."""
        cursor = self.cursor
        frame = cursor.optional_enter(ber.context_constructed(1), ber.context_constructed(3))
        if frame is None:
            return
        more_lists = True
        while more_lists:
            one = cursor.enter(ber.SEQUENCE)
            more = True
            while more:
                self._certificate()
                more = cursor.more(one)
            cursor.leave(one)
            more_lists = cursor.more(frame)
        cursor.leave(frame)

    def _signer_info(self) -> None:
        cursor = self.cursor
        frame = cursor.enter(ber.SEQUENCE)
        version = self._version("SignerInfo", "pkcs7_note_signerinfo_version")
        if version != self.version:
            raise KernelError(
                errno.EBADMSG,
                f"SignedData of version {self.version} with a SignerInfo of version {version}",
                "pkcs7_note_signerinfo_version",
            )
        self._signer_identifier()
        digest_oid = self._algorithm()
        if digest_oid not in oids.DIGESTS:
            raise KernelError(
                errno.ENOPKG,
                "signed with a digest the kernel does not know (it knows SHA-1, SHA-2 and SHA-3)",
                "pkcs7_sig_note_digest_algo",
            )
        attributes = self._signed_attributes()
        signature_oid = self._algorithm()
        if signature_oid not in oids.SIGNER_SIGNATURES:
            raise KernelError(
                errno.ENOPKG,
                "signed with an algorithm the kernel does not know (it knows rsaEncryption and ecdsa-with-…)",
                "pkcs7_sig_note_pkey_algo",
            )
        value = cursor.primitive(ber.OCTET_STRING)
        self._unsigned_attributes()
        cursor.leave(frame)
        if self.content_type == oids.MS_INDIRECT_DATA and attributes.signed is None:
            raise KernelError(errno.EBADMSG, "Authenticode without signed attributes", "pkcs7_note_signed_info")
        self.signers.append(
            SignerInfo(
                index=len(self.signers) + 1,
                id=self.issuer_id if version == 1 else self.key_id,
                hash_name=oids.DIGESTS[digest_oid],
                algorithm=oids.SIGNER_SIGNATURES[signature_oid],
                value=value,
                attributes=attributes,
            )
        )

    def _signer_identifier(self) -> None:
        cursor = self.cursor
        key_id = cursor.optional_primitive(ber.context(0))
        if key_id is not None:
            self.key_id = key_id
            return
        frame = cursor.enter(ber.SEQUENCE)
        issuer, _ = name(cursor)
        self.issuer_id = cursor.primitive(ber.INTEGER) + issuer
        cursor.leave(frame)

    def _signed_attributes(self) -> Attributes:
        cursor = self.cursor
        if implicit := cursor.optional_enter(ber.context_constructed(0)):
            attributes = self._attributes(implicit)
            content = cursor.leave(implicit)
            if not {oids.CONTENT_TYPE, oids.MESSAGE_DIGEST} <= attributes.present:
                raise KernelError(
                    errno.EBADMSG,
                    "signed attributes without contentType or messageDigest",
                    "pkcs7_sig_note_set_of_authattrs",
                )
            # The length octets are hashed as they stand, also those of an indefinite length, whose
            # end-of-contents octets are not.
            length_octets = cursor.data[implicit.start - implicit.header + 1 : implicit.start]
            return evolve(attributes, signed=bytes([ber.SET]) + length_octets + content)
        if explicit := cursor.optional_enter(ber.context_constructed(2)):
            sequence = cursor.enter(ber.SEQUENCE)
            attributes = self._attributes(sequence)
            cursor.leave(sequence)
            cursor.leave(explicit)
            return attributes
        return Attributes()

    def _attributes(self, frame: ber.Frame) -> Attributes:
        cursor = self.cursor
        attributes = Attributes()
        more = True
        while more:
            attribute = cursor.enter(ber.SEQUENCE)
            oid = cursor.primitive(ber.OBJECT_IDENTIFIER)
            values = cursor.enter(ber.SET)
            more_values = True
            while more_values:
                attributes = self._attribute_value(attributes, oid, cursor.anything())
                more_values = cursor.more(values)
            cursor.leave(values)
            cursor.leave(attribute)
            more = cursor.more(frame)
        return attributes

    def _attribute_value(self, attributes: Attributes, oid: bytes, element: ber.Element) -> Attributes:
        """Note one value of a signed attribute (``pkcs7_sig_note_authenticated_attr``)."""
        if oid not in _KNOWN_ATTRIBUTES:
            return attributes
        function = "pkcs7_sig_note_authenticated_attr"
        if oid in attributes.present:
            raise KernelError(
                errno.EKEYREJECTED, f"the signed attribute {_KNOWN_ATTRIBUTES[oid]} has two values", function
            )
        value = self.cursor.data[element.start : element.end]
        attributes = evolve(attributes, present=attributes.present | {oid})
        if oid == oids.CONTENT_TYPE:
            # The tag of the value is not looked at.
            if value != self.content_type:
                raise KernelError(errno.EBADMSG, "contentType attribute and content type differ", function)
        elif oid == oids.SIGNING_TIME:
            return evolve(attributes, signing_time=decode_time(element.tag, value))
        elif oid == oids.MESSAGE_DIGEST:
            if element.tag != ber.OCTET_STRING:
                raise KernelError(errno.EBADMSG, "a messageDigest that is no OCTET STRING", function)
            return evolve(attributes, message_digest=value)
        elif self.content_type != oids.MS_INDIRECT_DATA:
            raise KernelError(
                errno.EKEYREJECTED,
                f"the signed attribute {_KNOWN_ATTRIBUTES[oid]} is allowed for Authenticode only: "
                "sign with `openssl smime -noattr` or `openssl cms -nosmimecap`",
                function,
            )
        return attributes

    def _unsigned_attributes(self) -> None:
        cursor = self.cursor
        frame = cursor.optional_enter(ber.context_constructed(1), ber.context_constructed(3))
        if frame is None:
            return
        more = True
        while more:
            attribute = cursor.enter(ber.SEQUENCE)
            cursor.primitive(ber.OBJECT_IDENTIFIER)
            values = cursor.enter(ber.SET)
            more_values = True
            while more_values:
                cursor.anything()
                more_values = cursor.more(values)
            cursor.leave(values)
            cursor.leave(attribute)
            more = cursor.more(frame)
        cursor.leave(frame)
