"""The compression formats the kernel knows, each with the limits of the kernel's own decompressor.

Source: lib/decompress.c (which magic is whose) and lib/decompress_*.c. Their checks are not those of the tools of the
same names: the kernel refuses an xz file whose check is not CRC32, and never looks at a gzip file's checksum.
"""

import bz2
import lzma
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Final, Protocol

import lz4.block
from attrs import frozen

from ipe_emu.errors import CannotEmulateError, NotJudgedError
from ipe_emu.rehearse.image.buffer import Buffer

# Not where they are used: the process that unpacks has other ids by then, to which our own files may be closed.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Yields what comes out, in pieces; returns the offset behind what was read (the kernel's ``my_inptr``).
Decompression = Generator[bytes, None, int]

_IN: Final = 64 << 10
_OUT: Final = 256 << 10


@frozen
class Limits:
    """What a hostile image may cost at the most; beyond it ``NotJudgedError``.

    ``unpacked`` is bytes that come out of decompressors, ``entries`` members of archives. ``window`` is bytes that a
    decompressor may keep: 128 MiB is what zstd's own tool takes without being asked, and xz -9 needs 65 MiB.
    """

    unpacked: int = 4 << 30
    entries: int = 1_000_000
    window: int = 128 << 20


class DecompressionError(Exception):
    """The kernel's decompressor gives up; the text is its message."""


class _Decompressor(Protocol):
    """What the standard library's decompressors have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


@frozen
class Format:
    """A format by the first two bytes that tell it."""

    magic: bytes
    name: str
    decompress: Callable[[Buffer, int, Limits], Decompression]


def _run(buffer: Buffer, start: int, decompressor: _Decompressor, truncated: str) -> Decompression:
    """Decompress one stream. DecompressionError ``truncated`` if the buffer ends first; errors as the decompressor."""
    position = start
    while not decompressor.eof:
        data = b""
        if decompressor.needs_input:
            data = buffer.read(position, _IN)
            position += len(data)
            if not data:
                raise DecompressionError(truncated)
        if out := decompressor.decompress(data, _OUT):
            yield out
    return position - len(decompressor.unused_data)


# --- gzip -----------------------------------------------------------------------------------------------------------

_GZIP_HEADER: Final = 10
_GZIP_TRAILER: Final = 8
_GZIP_FNAME: Final = 0x08


def gunzip(buffer: Buffer, start: int, limits: Limits) -> Decompression:  # noqa: ARG001 - a window is 32 KiB
    """Lib/decompress_inflate.c: of the header's options only a file name is known; the checksum is skipped, unread."""
    header = buffer.read(start, _GZIP_HEADER)
    if len(header) < _GZIP_HEADER or not header.startswith(b"\x1f\x8b\x08"):
        raise DecompressionError("Not a gzip file")
    position = start + _GZIP_HEADER
    if header[3] & _GZIP_FNAME:
        position = _behind_name(buffer, position)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    data = b""
    while not inflate.eof:
        if not data:
            data = buffer.read(position, _IN)
            position += len(data)
            if not data:
                raise DecompressionError("read error")
        try:
            out = inflate.decompress(data, _OUT)
        except zlib.error:
            raise DecompressionError("uncompression error") from None
        if out:
            yield out
        data = inflate.unconsumed_tail
    end = position - len(inflate.unused_data) + _GZIP_TRAILER
    if end > buffer.size:
        raise NotJudgedError(
            f"the gzip data at byte {start} lacks its trailer of {_GZIP_TRAILER} bytes: the kernel then goes on to read"
            " behind the end of the image. Compress the image again"
        )
    return end


def _behind_name(buffer: Buffer, position: int) -> int:
    for chunk in buffer.chunks(position, size=_IN):
        end = chunk.find(b"\0")
        if end >= 0:
            return position + end + 1
        position += len(chunk)
    raise DecompressionError("header error")


# --- bzip2, lzma, xz --------------------------------------------------------------------------------------------------


def bunzip2(buffer: Buffer, start: int, limits: Limits) -> Decompression:  # noqa: ARG001 - a block is 900 kB
    """lib/decompress_bunzip2.c, which gives no message of its own for most faults."""
    try:
        return (yield from _run(buffer, start, bz2.BZ2Decompressor(), "decompressor failed"))
    except OSError:
        raise DecompressionError("decompressor failed") from None


_LZMA_HEADER: Final = 13
#: Of the header, how many bytes come out; all ones where that was not known.
_LZMA_SIZE: Final = slice(5, 13)
#: lc, lp and pb share a byte: (pb * 5 + lp) * 9 + lc.
_LZMA_PROPERTIES: Final = 9 * 5 * 5


def unlzma(buffer: Buffer, start: int, limits: Limits) -> Decompression:
    """lib/decompress_unlzma.c: the format of lzma(1), or ``xz --format=lzma``."""
    header = buffer.read(start, _LZMA_HEADER)
    if len(header) < _LZMA_HEADER:
        raise DecompressionError("unexpected EOF")
    if header[0] >= _LZMA_PROPERTIES:
        raise DecompressionError("bad header")
    if not any(header[_LZMA_SIZE]):
        raise DecompressionError("decompressor failed")  # no memory can be had for a buffer of nothing
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=limits.window)
    try:
        return (yield from _run(buffer, start, decompressor, "unexpected EOF"))
    except lzma.LZMAError as error:
        _check_memory(error, limits, start)
        if "format not supported" in str(error):
            # liblzma takes fewer headers than the kernel: no dictionary that is not 2^n or 2^n + 2^(n-1).
            raise NotJudgedError(f"the lzma data at byte {start} has a header that liblzma does not take") from None
        raise DecompressionError("LZMA data is corrupt") from None


_XZ_MAGIC: Final = b"\xfd7zXZ\0"
_XZ_WRONG: Final = "Input is not in the XZ format (wrong magic bytes)"
_XZ_CORRUPT: Final = "XZ-compressed data is corrupt"
_XZ_OPTIONS: Final = "Input was encoded with settings that are not supported by this XZ decoder"
_XZ_HEADER: Final = 12
_XZ_CRC32: Final = 1
_XZ_LARGEST_BLOCK_HEADER: Final = 1024
_XZ_LZMA2: Final = 0x21
#: Branch converters x86 to RISC-V (BCJ_* in lib/xz/xz_dec_bcj.c), all built in unless EXPERT took them away.
_XZ_BCJ: Final = range(4, 12)


def unxz(buffer: Buffer, start: int, limits: Limits) -> Decompression:
    """lib/decompress_unxz.c and lib/xz: checks beyond CRC32 and filters beyond LZMA2 and one branch converter fail."""
    header = buffer.read(start, _XZ_HEADER)
    if not header.startswith(_XZ_MAGIC):
        raise DecompressionError(_XZ_WRONG if len(header) >= len(_XZ_MAGIC) else _XZ_CORRUPT)
    if len(header) < _XZ_HEADER or zlib.crc32(header[6:8]) != int.from_bytes(header[8:], "little"):
        raise DecompressionError(_XZ_CORRUPT)
    if header[6] or header[7] > _XZ_CRC32:
        raise DecompressionError(_XZ_OPTIONS)
    _check_xz_filters(buffer.read(start + _XZ_HEADER, _XZ_LARGEST_BLOCK_HEADER))
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=limits.window)
    try:
        return (yield from _run(buffer, start, decompressor, _XZ_CORRUPT))
    except lzma.LZMAError as error:
        _check_memory(error, limits, start)
        raise DecompressionError(_XZ_CORRUPT) from None


def _check_xz_filters(block: bytes) -> None:
    """Look at the filters of the first block (dec_block_header() in lib/xz/xz_dec_stream.c).

    An encoder gives all blocks the same. Anything damaged is left to the decompressor.
    """
    if not block or not block[0]:
        return  # no block, only the index
    block = block[: (block[0] + 1) * 4 - 4]
    if len(block) < 2:
        return
    flags = block[1]
    if flags & 0x3E:
        raise DecompressionError(_XZ_OPTIONS)
    position = 2
    for has_size in (flags & 0x40, flags & 0x80):
        if has_size:
            while position < len(block) and block[position] & 0x80:
                position += 1
            position += 1
    filters = block[position:]
    if flags & 1:
        if len(filters) < 2:
            return
        if filters[0] not in _XZ_BCJ or filters[1]:
            raise DecompressionError(_XZ_OPTIONS)
        filters = filters[2:]
    if len(filters) >= 2 and (filters[0] != _XZ_LZMA2 or filters[1] != 1):
        raise DecompressionError(_XZ_OPTIONS)


def _check_memory(error: lzma.LZMAError, limits: Limits, start: int) -> None:
    if "emory" in str(error):
        raise _too_much_memory(start, limits) from None


def _too_much_memory(start: int, limits: Limits) -> NotJudgedError:
    return NotJudgedError(f"the data at byte {start} needs a window of more than {limits.window} bytes to decompress")


# --- zstd -------------------------------------------------------------------------------------------------------------

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def unzstd(buffer: Buffer, start: int, limits: Limits) -> Decompression:
    """lib/decompress_unzstd.c: one frame."""
    if not buffer.read(start, len(_ZSTD_MAGIC)).startswith(_ZSTD_MAGIC):
        raise DecompressionError("Input is not in the ZSTD format (wrong magic bytes)")
    window_log = limits.window.bit_length() - 1
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window_log})
    try:
        return (yield from _run(buffer, start, decompressor, "ZSTD-compressed data is truncated"))
    except zstd.ZstdError as error:
        if "memory" in str(error):
            raise _too_much_memory(start, limits) from None
        surely = any(word in str(error) for word in ("corrupt", "checksum", "too small"))
        raise DecompressionError(f"ZSTD-compressed data is {'' if surely else 'probably '}corrupt") from None


# --- lz4 --------------------------------------------------------------------------------------------------------------

_LZ4_MAGIC: Final = 0x184C2102
_LZ4_BLOCK: Final = 8 << 20
#: LZ4_compressBound() of a block: no longer one can be valid.
_LZ4_LONGEST: Final = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16


def unlz4(buffer: Buffer, start: int, limits: Limits) -> Decompression:  # noqa: ARG001 - a block is 8 MiB
    """lib/decompress_unlz4.c: the legacy format alone (``lz4 -l``), blocks of 8 MiB; it ends at a length of zero."""
    if _word(buffer, start) != _LZ4_MAGIC:
        raise DecompressionError("invalid header")
    position: int = start + 4
    while (length := _word(buffer, position)) is not None and length:
        position += 4
        if length == _LZ4_MAGIC:  # another legacy file behind the first
            continue
        block = buffer.read(position, min(length, _LZ4_LONGEST))
        try:
            out = lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError:
            out = None
        if out is None or len(block) < length:
            raise DecompressionError("Decoding failed")
        if out:
            yield out
        position += length
        if position == buffer.size:
            break
    return position


def _word(buffer: Buffer, offset: int) -> int | None:
    data = buffer.read(offset, 4)
    return int.from_bytes(data, "little") if len(data) == 4 else None


# --- lzo --------------------------------------------------------------------------------------------------------------

_LZOP_MAGIC: Final = b"\x89LZO\0\r\n\x1a\n"
_LZO_BLOCK: Final = 256 << 10
_LZOP_FILTER: Final = 0x800
#: The flags of all four checksums (lzop: F_ADLER32_D, F_CRC32_D, F_ADLER32_C, F_CRC32_C).
_LZOP_ALL_CHECKSUMS: Final = 0x303
_LZOP_LONGEST_HEADER: Final = 512


def unlzo(buffer: Buffer, start: int, limits: Limits) -> Decompression:  # noqa: ARG001 - a block is 256 KiB
    """lib/decompress_unlzo.c: the format of lzop(1), blocks of at most 256 KiB with one checksum, which is not read.

    The blocks are decompressed by lzop(1) itself.
    """
    data_start = _behind_lzop_header(buffer, start)
    end = _end_of_lzo_blocks(buffer, data_start)
    tool = shutil.which("lzop")
    if tool is None:
        raise CannotEmulateError("this image is compressed with lzo, and that needs lzop: apt-get install lzop")
    yield from _through(tool, buffer, start, end)
    return end


def _behind_lzop_header(buffer: Buffer, start: int) -> int:
    header = buffer.read(start, _LZOP_LONGEST_HEADER)
    if not header.startswith(_LZOP_MAGIC):
        raise DecompressionError("invalid header")
    try:
        newer = int.from_bytes(header[9:11], "big") >= 0x0940
        position = 16 + newer
        flags: int = struct.unpack_from(">I", header, position)[0]
        position += 8 if flags & _LZOP_FILTER else 4
        position += 12 if newer else 8
        position += 1 + header[position] + 4
    except (struct.error, IndexError):
        raise DecompressionError("invalid header") from None
    if position > len(header):
        raise DecompressionError("invalid header")
    if (flags & _LZOP_ALL_CHECKSUMS) not in (0x001, 0x100):
        # The kernel takes it that each block has exactly one checksum, and reads nonsense if not.
        raise DecompressionError("Compressed data violation")
    return start + position


def _end_of_lzo_blocks(buffer: Buffer, position: int) -> int:
    """Return the offset behind the last block and the zero that ends them; the sizes are checked as in ``unlzo()``."""
    while True:
        head = buffer.read(position, 12)
        if len(head) < 4:
            raise DecompressionError("file corrupted")
        plain = int.from_bytes(head[:4], "big")
        if not plain:
            return position + 4
        if plain > _LZO_BLOCK:
            raise DecompressionError("dest len longer than block size")
        packed = int.from_bytes(head[4:8], "big")
        if len(head) < 12 or not 0 < packed <= plain or position + 12 + packed > buffer.size:
            raise DecompressionError("file corrupted")
        position += 12 + packed


def _through(tool: str, buffer: Buffer, start: int, end: int) -> Iterator[bytes]:
    """Yield what ``tool`` makes of a part of the buffer. NotJudgedError if it fails: it checks more than a kernel."""
    with subprocess.Popen(
        [tool, "-d", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None  # noqa: S101 - it is, of a pipe
        assert process.stdout is not None  # noqa: S101 - as above
        feeder = threading.Thread(target=_feed, args=(process, buffer, start, end), daemon=True)
        feeder.start()
        try:
            while out := process.stdout.read(_OUT):
                yield out
        finally:
            process.stdout.close()  # if nobody wants the rest: the tool ends, and with it the feeder
            feeder.join()
    if process.returncode:
        raise NotJudgedError(f"lzop could not decompress the lzo data at byte {start}")


def _feed(process: "subprocess.Popen[bytes]", buffer: Buffer, start: int, end: int) -> None:
    stdin = process.stdin
    with suppress(OSError):
        while stdin is not None and start < end and (data := buffer.read(start, min(_IN, end - start))):
            stdin.write(data)
            start += len(data)
    with suppress(OSError):
        if stdin is not None:
            stdin.close()


FORMATS: Final = (
    Format(b"\x1f\x8b", "gzip", gunzip),
    Format(b"\x1f\x9e", "gzip", gunzip),
    Format(b"BZ", "bzip2", bunzip2),
    Format(b"\x5d\x00", "lzma", unlzma),
    Format(b"\xfd7", "xz", unxz),
    Format(b"\x89L", "lzo", unlzo),
    Format(b"\x02!", "lz4", unlz4),
    Format(b"\x28\xb5", "zstd", unzstd),
)


def format_of(first: bytes) -> Format | None:
    """Return the format that the first two bytes name (``decompress_method()``)."""
    return next((known for known in FORMATS if first[:2] == known.magic), None)
