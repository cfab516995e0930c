"""One lenient BER cursor: what the kernel's ASN.1 decoder takes, and nothing it refuses.

ITU-T X.690 describes the encodings. The decoder (``asn1_ber_decoder``) is more generous than DER and more
limited than BER: lengths need not be minimal and constructed types may be of indefinite length, but tags
have one octet and lengths at most two octets after the first.

A parser asks for one element after the other; the first octet that does not fit raises EBADMSG, so that
faults are found in the order of the bytes, as the kernel finds them.
"""

import errno
from typing import NamedTuple, NoReturn

from ipe_emu.errors import KernelError

BOOLEAN = 0x01
INTEGER = 0x02
BIT_STRING = 0x03
OCTET_STRING = 0x04
OBJECT_IDENTIFIER = 0x06
UTC_TIME = 0x17
GENERALIZED_TIME = 0x18
SEQUENCE = 0x30
SET = 0x31

CONSTRUCTED = 0x20
LONG_TAG = 0x1F
INDEFINITE = 0x80


def context(number: int) -> int:
    """Return the tag of a primitive context-specific element, ``[number] IMPLICIT``."""
    return 0x80 | number


def context_constructed(number: int) -> int:
    """Return the tag of a constructed context-specific element."""
    return 0xA0 | number


class Frame(NamedTuple):
    """An open constructed element: what ``leave`` needs to close it."""

    tag: int
    header: int
    """Octets of tag and length; the content starts at ``start``."""
    start: int
    indefinite: bool
    outer_end: int


class Element(NamedTuple):
    """A whole element that was taken without looking inside."""

    tag: int
    header: int
    start: int
    end: int
    """End of the content. The end-of-contents octets of an indefinite length count as content."""


class Cursor:
    """A position in hostile bytes and the end of the innermost definite element around it.

    ``what`` names the structure in error messages. Every method raises ``KernelError(EBADMSG)``
    (``asn1_ber_decoder``) where the decoder would.
    """

    __slots__ = ("data", "end", "pos", "what")

    def __init__(self, data: bytes, what: str, pos: int = 0, end: int | None = None) -> None:
        self.data = data
        self.what = what
        self.pos = pos
        self.end = len(data) if end is None else end

    def malformed(self, why: str) -> NoReturn:
        """Raise what the decoder answers to anything that does not fit its grammar."""
        raise KernelError(
            errno.EBADMSG, f"{self.what} is not well-formed at byte {self.pos}: {why}", "asn1_ber_decoder"
        )

    @property
    def at_end(self) -> bool:
        """Whether the innermost definite element holds nothing more."""
        return self.pos == self.end

    def peek(self) -> int:
        """Return the tag at the cursor."""
        if self.end - self.pos < 2:
            self.malformed("it ends where an element is expected")
        tag = self.data[self.pos]
        if tag & LONG_TAG == LONG_TAG:
            self.malformed("a tag of more than one octet")
        return tag

    def _length(self) -> int:
        """Read the length octets after the tag at the cursor; -1 stands for the indefinite form."""
        data = self.data
        tag = data[self.pos]
        length = data[self.pos + 1]
        self.pos += 2
        if length == INDEFINITE:
            if not tag & CONSTRUCTED:
                self.malformed("a primitive element of indefinite length")
            if self.end - self.pos < 2:
                self.malformed("it ends inside an element of indefinite length")
            return -1
        if length > INDEFINITE:
            octets = length - INDEFINITE
            if octets > 2:
                self.malformed("a length of more than two octets")
            if octets > self.end - self.pos:
                self.malformed("it ends inside a length")
            length = int.from_bytes(data[self.pos : self.pos + octets])
            self.pos += octets
        if length > self.end - self.pos:
            self.malformed(f"an element of {length} bytes where {self.end - self.pos} are left")
        return length

    def primitive(self, tag: int) -> bytes:
        """Take a primitive element with exactly this tag and return its content."""
        found = self.peek()
        if found != tag:
            self.malformed(f"tag {found:#04x} where {tag:#04x} is expected")
        length = self._length()
        start = self.pos
        self.pos = start + length
        return self.data[start : self.pos]

    def optional_primitive(self, tag: int) -> bytes | None:
        """Take a primitive element if the next one has this tag."""
        if self.pos == self.end or self.peek() != tag:
            return None
        return self.primitive(tag)

    def enter(self, tag: int) -> Frame:
        """Open a constructed element.

        The constructed bit of the data does not count here: the decoder takes 0x10 for a SEQUENCE
        (0x30) and 0x80 for ``[0]`` (0xa0).
        """
        found = self.peek()
        if (found ^ tag) & ~CONSTRUCTED:
            self.malformed(f"tag {found:#04x} where {tag:#04x} is expected")
        before = self.pos
        length = self._length()
        frame = Frame(found, self.pos - before, self.pos, length < 0, self.end)
        if length >= 0:
            self.end = self.pos + length
        return frame

    def optional_enter(self, *tags: int) -> Frame | None:
        """Open a constructed element if the next one has one of these tags."""
        if self.pos == self.end:
            return None
        found = self.peek() | CONSTRUCTED
        return self.enter(found) if found in tags else None

    def more(self, frame: Frame) -> bool:
        """Return whether a SEQUENCE OF or SET OF goes on; ask after each item (the first one is not optional)."""
        if not frame.indefinite:
            return self.pos < self.end
        if self.end - self.pos < 2:
            self.malformed("it ends before the end-of-contents octets")
        return self.data[self.pos] != 0

    def leave(self, frame: Frame) -> bytes:
        """Close a constructed element that must end here; return its content, without end-of-contents octets."""
        content_end = self.pos
        if frame.indefinite:
            if self.more(frame):
                self.malformed("an element too many, or no end-of-contents octets")
            if self.data[self.pos + 1] != 0:
                self.malformed("end-of-contents octets with a length")
            self.pos += 2
        elif self.pos != self.end:
            self.malformed("an element too many")
        self.end = frame.outer_end
        return self.data[frame.start : content_end]

    def anything(self) -> Element:
        """Take whatever element comes next without looking inside (ANY in the kernel's grammars).

        An end-of-contents pair counts as an element: an AlgorithmIdentifier of indefinite length without
        parameters loses its end to the optional parameters, and fails.
        """
        tag = self.peek()
        before = self.pos
        length = self._length()
        start = self.pos
        if length < 0:
            self._skip_indefinite()
        else:
            self.pos += length
        return Element(tag, start - before, start, self.pos)

    def optional_anything(self) -> Element | None:
        """Take any element, unless the innermost definite element ends here."""
        return None if self.pos == self.end else self.anything()

    def _skip_indefinite(self) -> None:
        """Move behind the end-of-contents octets that close the element of indefinite length just opened.

        Inside, long tags and lengths of up to seven octets are taken (``asn1_find_indefinite_length``).
        """
        data = self.data
        level = 1
        while level:
            if self.end - self.pos < 2:
                self.malformed("it ends before the end-of-contents octets")
            tag = data[self.pos]
            self.pos += 1
            if tag == 0:
                if data[self.pos] != 0:
                    self.malformed("end-of-contents octets with a length")
                self.pos += 1
                level -= 1
                continue
            if tag & LONG_TAG == LONG_TAG:
                self._skip_long_tag()
            length = data[self.pos]
            self.pos += 1
            if length == INDEFINITE:
                if not tag & CONSTRUCTED:
                    self.malformed("a primitive element of indefinite length")
                level += 1
                continue
            if length > INDEFINITE:
                length = self._long_length(length - INDEFINITE)
            if length > self.end - self.pos:
                self.malformed(f"an element of {length} bytes where {self.end - self.pos} are left")
            self.pos += length

    def _skip_long_tag(self) -> None:
        more = True
        while more:
            if self.end - self.pos < 2:
                self.malformed("it ends inside a tag")
            more = bool(self.data[self.pos] & 0x80)
            self.pos += 1

    def _long_length(self, octets: int) -> int:
        if octets > 7:
            self.malformed("a length of more than seven octets")
        if octets > self.end - self.pos:
            self.malformed("it ends inside a length")
        length = int.from_bytes(self.data[self.pos : self.pos + octets])
        self.pos += octets
        return length
