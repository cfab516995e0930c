"""The members of an initramfs buffer, one after the other, as ``unpack_to_rootfs()`` finds them (init/initramfs.c).

The buffer is a mixture of cpio members and of compressed streams of them, with zeros between; within a stream, zeros
may stand between members as well. A fault ends the unpacking and not the boot: what came before it is there.
"""

from collections.abc import Generator, Iterator
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.rehearse.image.buffer import Buffer
from ipe_emu.rehearse.image.compression import Decompression, DecompressionError, Limits, format_of
from ipe_emu.rehearse.image.cpio import HEADER_SIZE, PATH_MAX, TRAILER, Entry, Header, HeaderError, align, parse_header

_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000
_S_IFLNK: Final = 0o120000


@frozen
class Fault:
    """Why the kernel stopped unpacking: it prints ``Initramfs unpacking failed: MESSAGE`` and boots what is there.

    ``offset`` is the byte of the image where the faulty member, or the compressed stream that holds it, begins;
    ``within`` the byte of that stream's content, None outside of one. ``after`` is the last member before it.
    ``exact`` is false for damaged compressed data: how much of its end the kernel had unpacked is not known here.
    """

    message: str
    offset: int
    within: int | None = None
    after: bytes | None = None
    exact: bool = True

    def __str__(self) -> str:
        where = f"byte {self.offset}" + ("" if self.within is None else f", byte {self.within} of what is in it")
        behind = "" if self.after is None else f", behind {self.after!r}"
        return f"{self.message} (at {where}{behind})"


@frozen
class EndOfArchive:
    """A member called TRAILER!!!: hard links do not reach across it."""


@frozen
class Segment:
    """Where a part of the image begins, and how it is compressed: ``none``, or a format's name."""

    offset: int
    compression: str


#: Yields members; returns the offset of the image where it goes on, or None after a fault.
_Parsing = Generator["Entry | EndOfArchive", None, "int | None"]


@define(eq=False)
class _Stream:
    """Bytes that arrive in pieces. ``offset`` counts what was taken (the kernel's ``this_header``)."""

    _pieces: Iterator[bytes]
    offset: int
    error: DecompressionError | None = None
    _rest: memoryview = field(factory=lambda: memoryview(b""), init=False)

    def _more(self) -> bool:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return False
            except DecompressionError as error:
                self.error = error
                return False
        return True

    def take(self, length: int) -> bytes:
        """Return the next bytes, fewer than ``length`` at the end."""
        if len(self._rest) >= length:
            taken = bytes(self._rest[:length])
            self._rest = self._rest[length:]
            self.offset += length
            return taken
        return b"".join(self.pieces(length))

    def pieces(self, length: int) -> Iterator[bytes]:
        """Yield the next bytes as they come, up to ``length``."""
        while length > 0 and self._more():
            piece = bytes(self._rest[:length])
            self._rest = self._rest[length:]
            self.offset += len(piece)
            length -= len(piece)
            yield piece

    def skip(self, length: int) -> bool:
        """Pass over ``length`` bytes; return whether they were all there."""
        while length > 0 and self._more():
            passed = min(length, len(self._rest))
            self._rest = self._rest[passed:]
            self.offset += passed
            length -= passed
        return length <= 0

    def skip_zeros(self) -> bytes:
        """Pass over zeros, and return the byte behind them without taking it; nothing at the end."""
        while self._more():
            piece = bytes(self._rest)
            zeros = len(piece) - len(piece.lstrip(b"\0"))
            self._rest = self._rest[zeros:]
            self.offset += zeros
            if self._rest:
                return piece[zeros : zeros + 1]
        return b""


@define(eq=False)
class _Output:
    """What a decompressor gives, counted against the limit; ``end`` is known when it has ended."""

    _decompression: Decompression
    _limits: Limits
    size: int = 0
    end: int | None = None

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                piece = next(self._decompression)
            except StopIteration as done:
                self.end = done.value
                return
            self.size += len(piece)
            if self.size > self._limits.unpacked:
                raise NotJudgedError(f"the image has more than {self._limits.unpacked} bytes when it is decompressed")
            yield piece


@define(eq=False)
class Archive:
    """The members of a buffer; iterated once. ``fault`` and ``cut`` are known at the end.

    ``cut`` is the member in which the image ends. Unless it was compressed, the kernel says nothing of that, and
    leaves the file with zeros at its end.

    ``strict_headers``: a header with anything but hexadecimal digits is damaged, as newer kernels say.
    Iterating raises NotJudgedError where a limit is exceeded or what the kernel does is not determined.
    """

    buffer: Buffer
    strict_headers: bool = True
    limits: Limits = field(factory=Limits)
    segments: list[Segment] = field(factory=list, init=False)
    fault: Fault | None = field(default=None, init=False)
    cut: bytes | None = field(default=None, init=False)
    _stream: _Stream | None = field(default=None, init=False, repr=False)
    _header: Header | None = field(default=None, init=False, repr=False)
    _data_end: int = field(default=0, init=False)
    _member_start: int = field(default=0, init=False)
    _last: bytes | None = field(default=None, init=False)
    _segment: int | None = field(default=None, init=False)
    _entries: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Entry | EndOfArchive]:
        """Yield the members."""
        position = 0
        # The kernel's state Start, which allows no zeros before the first header; Reset, which does, comes after it.
        fresh = True
        while self.fault is None and (first := self.buffer.read(position, 2)):
            if first[:1] == b"0" and position % 4 == 0:
                self.segments.append(Segment(position, "none"))
                stream = _Stream(self.buffer.chunks(position), position)
                yield from self._plain(stream)
                position = stream.offset
            elif first[:1] == b"\0":
                zeros = _Stream(self.buffer.chunks(position), position)
                zeros.skip_zeros()
                position = zeros.offset
                continue  # the state stays what it is
            else:
                end = yield from self._compressed(first, position, fresh=fresh)
                if end is None:
                    return
                position = end
            fresh = False

    def data(self) -> Iterator[bytes]:
        """Yield the data of the member that was yielded last; then its checksum is compared (``do_copy()``)."""
        stream, header = self._stream, self._header
        if stream is None or header is None:
            return
        total = 0
        for piece in stream.pieces(self._data_end - stream.offset):
            if header.checksum is not None:
                total += sum(piece)
            yield piece
        if stream.offset == self._data_end and header.checksum is not None and total & 0xFFFFFFFF != header.checksum:
            self._fail("bad data checksum")

    # --- the two kinds of segments --------------------------------------------------------------------------------

    def _plain(self, stream: _Stream) -> Iterator[Entry | EndOfArchive]:
        """Yield members that are not compressed, up to something else. An image that ends within one is no fault."""
        while (yield from self._member(stream, None)):
            following = stream.skip_zeros()
            if following and stream.offset % 4:
                self._member_start = stream.offset
                self._fail("broken padding")
            if following != b"0" or self.fault is not None:
                return

    def _compressed(self, first: bytes, position: int, *, fresh: bool) -> _Parsing:
        """Yield the members of a compressed stream; return the offset behind it, or None after a fault."""
        known = format_of(first)
        self._segment, self._member_start = None, position
        if known is None:
            self._fail("invalid magic at start of compressed archive")
            return None
        self.segments.append(Segment(position, known.name))
        output = _Output(known.decompress(self.buffer, position, self.limits), self.limits)
        stream = _Stream(iter(output), 0)
        self._segment, self._member_start = position, 0
        whole = yield from self._stream_of_members(stream, position, fresh=fresh)
        if self.fault is None and stream.error is not None:
            # The decompressor's own message comes first, and is the one that stays.
            self._fail(str(stream.error), exact=False)
        if self.fault is None and not whole:
            self._fail("junk at the end of compressed archive")
        return None if self.fault is not None else output.end

    def _stream_of_members(
        self, stream: _Stream, position: int, *, fresh: bool
    ) -> Generator[Entry | EndOfArchive, None, bool]:
        """Yield the members of a stream up to its end; return whether it ends between two members."""
        while True:
            if not fresh:
                following = stream.skip_zeros()
                if not following:
                    return True
                self._member_start = stream.offset
                if stream.offset % 4:
                    self._fail("broken padding")
                elif following != b"0":
                    self._fail("junk within compressed archive")
                if self.fault is not None:
                    return False
            fresh = False
            if not (yield from self._member(stream, position)):
                return False

    # --- one member -----------------------------------------------------------------------------------------------

    def _member(self, stream: _Stream, segment: int | None) -> Generator[Entry | EndOfArchive, None, bool]:
        """Read one member (``do_header()`` to ``do_skip()``); return whether it was whole, and no fault was found.

        ``segment`` is where the compressed stream begins that it is in.
        """
        self._stream, self._segment = stream, segment
        self._member_start = stream.offset
        head = stream.take(HEADER_SIZE)
        if len(head) < HEADER_SIZE:
            return self._ends_within(b"(a header)")
        try:
            header = parse_header(head, strict=self.strict_headers)
        except HeaderError as error:
            self._fail(str(error))
            return False
        following = align(stream.offset + header.padded_name_size + header.size)
        kind = header.mode & _S_IFMT
        readable = 0 < header.name_size <= PATH_MAX and (
            header.size <= PATH_MAX if kind == _S_IFLNK else kind == _S_IFREG or not header.size
        )
        if not readable:
            self._check_that_it_is_passed_over()
            return stream.skip(following - stream.offset) or self._ends_within(b"(a member that is passed over)")
        text = stream.take(header.padded_name_size + (header.size if kind == _S_IFLNK else 0))
        if len(text) < header.padded_name_size + (header.size if kind == _S_IFLNK else 0):
            return self._ends_within(b"(a name)")
        if text[header.name_size - 1]:
            self._fail("malformed archive")
            return False
        name = text[: header.name_size].partition(b"\0")[0]
        if kind != _S_IFLNK and name == TRAILER:
            yield EndOfArchive()
        else:
            target = text[header.padded_name_size :].partition(b"\0")[0] if kind == _S_IFLNK else None
            yield from self._entry(header, name, target)
        if self.fault is not None:
            return False
        self._last = name
        # The kernel looks for the next member only where this one, padding included, has ended.
        return stream.skip(following - stream.offset) or self._ends_within(name)

    def _entry(self, header: Header, name: bytes, target: bytes | None) -> Iterator[Entry]:
        assert self._stream is not None  # noqa: S101 - there is one while a member is read
        self._entries += 1
        if self._entries > self.limits.entries:
            raise NotJudgedError(f"the image has more than {self.limits.entries} members")
        self._header = header
        self._data_end = self._stream.offset + (header.size if target is None else 0)
        yield Entry(
            name, header.mode, header.uid, header.gid, header.nlink, header.mtime,
            header.size if target is None else 0, header.ino, header.dev, header.rdev, target,
        )  # fmt: skip
        self._header = None

    def _check_that_it_is_passed_over(self) -> None:
        """Refuse a member without a usable name, or with data where no data belongs, in a compressed stream.

        ``do_header()`` passes it over, but into whatever state came last: between members as a rule, and into the
        same header once more where that was cut by the end of the decompressor's buffer.
        """
        if self._segment is not None:
            raise NotJudgedError(
                f"the member at byte {self._member_start} of the compressed archive at byte {self._segment} has a name"
                " that is empty or too long, or data though it is no regular file: what a kernel does with the rest"
                " depends on the size of its buffers. Make the image again with cpio -o -H newc"
            )

    def _ends_within(self, name: bytes) -> bool:
        self.cut = name
        return False

    def _fail(self, message: str, *, exact: bool = True) -> None:
        if self.fault is None:  # error() keeps the first message
            inside = self._segment is not None
            self.fault = Fault(
                message,
                self._segment if self._segment is not None else self._member_start,
                self._member_start if inside else None,
                self._last,
                exact,
            )
