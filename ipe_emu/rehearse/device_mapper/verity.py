"""The target verity: its arguments (``verity_ctr()``), and its verified content (drivers/md/dm-verity-target.c)."""

import errno
import os
import re
from typing import Final, NoReturn

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError, UserError
from ipe_emu.integrity import algorithms
from ipe_emu.integrity.dm_verity import CorruptedError, Parameters, VerifiedBlocks
from ipe_emu.integrity.dm_verity.blocks import Read
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.rehearse.block.content import SECTOR
from ipe_emu.rehearse.block.device import BlockDevice
from ipe_emu.rehearse.device_mapper.arguments import unsigned, unsigned_long_long
from ipe_emu.rehearse.device_mapper.target import Corruption, ReadError, Table

_PAGE_SIZE: Final = 4096
_INT_MAX: Final = (1 << 31) - 1
_HEX: Final = re.compile(rb"(?:[0-9a-fA-F]{2})*")
#: DM_VERITY_OPTS_MAX, with forward error correction and signatures built in as distributions have them.
_MOST_OPTIONS: Final = 15
_PRIMARY: Final = 10

_ON_CORRUPTION: Final = {
    "ignore_corruption": "ignore",
    "restart_on_corruption": "restart",
    "panic_on_corruption": "panic",
}
_ON_ERROR: Final = {"restart_on_error": "restart", "panic_on_error": "panic"}
#: More of a device than this is not looked through for corruption that a kernel might have come upon.
_MOST_LOOKED_THROUGH: Final = 8 << 30
_CORRECTION: Final = frozenset({"use_fec_from_device", "fec_blocks", "fec_start", "fec_roots"})


@define
class Options:
    """The optional arguments, as ``verity_status()`` shows them again."""

    on_corruption: str = ""
    on_error: str = ""
    ignore_zero_blocks: bool = False
    check_at_most_once: bool = False
    try_verify_in_tasklet: bool = False
    key_description: bytes | None = None
    signature: bytes = b""

    def words(self) -> list[bytes]:
        """Return them in the kernel's order, with their number before them if there are any."""
        words = [word.encode() for word in (self.on_corruption, self.on_error) if word]
        for word, given in (
            (b"ignore_zero_blocks", self.ignore_zero_blocks),
            (b"check_at_most_once", self.check_at_most_once),
            (b"try_verify_in_tasklet", self.try_verify_in_tasklet),
        ):
            if given:
                words.append(word)
        if self.key_description is not None:
            words += [b"root_hash_sig_key_desc", self.key_description]
        return [b"%d" % len(words), *words] if words else []


@define(eq=False)
class VerityContent:
    """What can be read from a verity device: blocks that the tree vouches for. Safe for threads."""

    blocks: VerifiedBlocks
    size: int
    name: str
    data_device: str
    action: str
    on_error: str
    _table: Table = field(repr=False)
    corrupted: bool = False
    read_only: bool = field(default=True, init=False)
    _was_read: bool = field(default=False, init=False)

    def read(self, offset: int, length: int) -> bytes:
        """Return verified bytes. CorruptedError (EIO), unless corruption is to be ignored; it is reported each time."""
        size = self.blocks.parameters.data_block_size
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        first = offset // size
        self._was_read = True
        data = b"".join(self._block(number) for number in range(first, (end - 1) // size + 1))
        start = offset - first * size
        return data[start : start + end - offset]

    def write(self, offset: int, data: bytes) -> NoReturn:  # noqa: ARG002 - as every content
        """Raise KernelError EPERM: a verity device is read-only."""
        raise KernelError(errno.EPERM, "a verity device is read-only", "blkdev_write_iter")

    def _block(self, number: int) -> bytes:
        try:
            return self.blocks.read_block(number)
        except CorruptedError as error:
            self.corrupted = True
            self._table.faulty(Corruption(self.name, self.data_device, error.reason, self.action))
            if self.action != "ignore":
                raise
            size = self.blocks.parameters.data_block_size
            return self.blocks.read_data(number * size, size)
        except KernelError as error:
            # verity_finish_io(): not for what is only read ahead, and nothing is here.
            if self.on_error:
                self._table.faulty(ReadError(self.name, error.reason, self.on_error))
            raise

    def look_for_corruption(self) -> None:
        """Say so if there is corruption that nobody came upon: a kernel reads ahead, and ends the machine for it."""
        if not self._was_read or self.corrupted:
            return
        found = ""
        if self.size > _MOST_LOOKED_THROUGH:
            found = "is too large to be looked through for corruption"
        for number in range(0 if found else self.size // self.blocks.parameters.data_block_size):
            try:
                self.blocks.read_block(number)
            except CorruptedError as error:
                found = f"is corrupted where it was not read: {error.reason}"
                break
            except KernelError:  # nothing comes of that where it is read ahead
                continue
        if found:
            self._table.not_judged(
                f"the verity device {self.name} {found}. With {self.action}_on_corruption a kernel ends the machine if"
                " it reads that, be it ahead"
            )


@frozen(eq=False)
class Verity:
    """A target verity. ``root_hash_text`` is the root hash as it was written."""

    length: int
    data_device: BlockDevice
    hash_device: BlockDevice
    parameters: Parameters
    hash_start: int
    root_hash: bytes
    options: Options
    content: VerityContent
    shows_corrections: bool
    type: str = field(default="verity", init=False)

    @property
    def block_size(self) -> int:
        """Its logical block size (``verity_io_hints()``)."""
        return self.parameters.data_block_size

    @property
    def area(self) -> tuple[BlockDevice, int]:
        """See `Target.area`."""
        return self.data_device, 0

    @property
    def facts(self) -> Facts:
        """The root hash, and whether it is signed (``verity_preresume()``)."""
        return Facts(
            dmverity_roothash=Digest(self.parameters.algorithm, self.root_hash),
            dmverity_signature=bool(self.options.signature),
        )

    def info(self) -> bytes:
        """Return its status: V, or C once corruption was found; behind it, how often blocks were corrected."""
        state = b"C" if self.content.corrupted else b"V"
        return state + b" -" if self.shows_corrections else state

    def table(self) -> bytes:
        """Return its arguments."""
        p = self.parameters
        words = [
            b"%d" % p.hash_type, self.data_device.shown.encode(), self.hash_device.shown.encode(),
            b"%d" % p.data_block_size, b"%d" % p.hash_block_size, b"%d" % p.data_blocks, b"%d" % self.hash_start,
            p.algorithm.encode(), self.root_hash.hex().encode(), p.salt.hex().encode() or b"-",
        ]  # fmt: skip
        return b" ".join(words + self.options.words())


@frozen
class VerityType:
    """Makes targets verity; ``require_signatures`` is the module parameter (``dm_verity.require_signatures=1``).

    ``shows_corrections``: the kernel's status has a second word, which is ``-`` without forward error correction.
    """

    shows_corrections: bool
    require_signatures: bool = False

    def __call__(self, table: Table, length: int, words: list[bytes]) -> Verity:
        """Make a target of its arguments; KernelError as ``verity_ctr()``, NotJudgedError for what is not emulated."""
        if not table.read_only:
            raise _invalid("the table is not read-only")
        if len(words) < _PRIMARY:
            raise _invalid(f"{len(words)} arguments; there are {_PRIMARY} at least")
        _read_options(words[_PRIMARY:], None)
        version = unsigned(words[0])
        if version not in {0, 1}:
            raise _invalid(f"version is {_shown(words[0])}")
        data_device = table.get_device(words[1])
        hash_device = table.get_device(words[2])
        data_block_size = _block_size("data", words[3], data_device, _PAGE_SIZE)
        hash_block_size = _block_size("hash", words[4], hash_device, _INT_MAX)
        data_blocks = _blocks("number of data blocks", words[5], data_block_size)
        if length > data_blocks * (data_block_size // SECTOR):
            raise _invalid(f"the target has {length} sectors, and only {data_blocks} blocks are hashed")
        hash_start = _blocks("first hash block", words[6], hash_block_size)
        algorithm, digest_size = _algorithm(words[7])
        if hash_block_size < digest_size * 2:
            raise _invalid(f"a hash block of {hash_block_size} bytes does not hold two digests")
        root_hash = _hexadecimal("root hash", words[8], digest_size)
        salt = b"" if words[9] == b"-" else _hexadecimal("salt", words[9])
        options = _read_options(words[_PRIMARY:], table, data_blocks)
        self._verify_root_hash(table, words[8], options.signature)
        try:
            parameters = Parameters(data_blocks, algorithm, version, data_block_size, hash_block_size, salt)
            tree_offset = hash_start * hash_block_size
            end = tree_offset + parameters.tree_size
            if hash_device.size // hash_block_size * hash_block_size < end:
                raise KernelError(errno.E2BIG, f"{hash_device.name} ends before the hash tree does", "verity_ctr")
            blocks = VerifiedBlocks(
                parameters,
                root_hash,
                _reader(data_device),
                _reader(hash_device),
                tree_offset,
                options.ignore_zero_blocks,
            )
        except UserError as error:
            raise NotJudgedError(f"a verity table that is not emulated: {error}") from None
        action, on_error = _ON_CORRUPTION.get(options.on_corruption, "eio"), _ON_ERROR.get(options.on_error, "")
        content = VerityContent(blocks, length * SECTOR, table.owner_name, data_device.shown, action, on_error, table)
        if action in {"restart", "panic"}:
            table.at_end.append(content.look_for_corruption)
        return Verity(
            length, data_device, hash_device, parameters, hash_start, root_hash, options, content,
            self.shows_corrections,
        )  # fmt: skip

    def _verify_root_hash(self, table: Table, text: bytes, signature: bytes) -> None:
        if signature:
            table.surroundings.verify_root_hash(text, signature)
        elif self.require_signatures:
            raise KernelError(errno.ENOKEY, "dm_verity.require_signatures is set", "verity_verify_root_hash")


def _read_options(words: list[bytes], table: Table | None, data_blocks: int = 0) -> Options:
    """Read the optional arguments (``verity_parse_opt_args()``).

    Without ``table`` they are only counted, which the kernel does before it looks at the others.
    """
    options = Options()
    if not words:
        return options
    count = unsigned(words[0])
    if count is None or count > _MOST_OPTIONS or count > len(words) - 1:
        raise _invalid(f"{_shown(words[0])} is not the number of optional arguments")
    if table is None:
        return options
    given = iter(words[1 : 1 + count])
    for word in given:
        name = word.lower().decode("latin-1")  # strcasecmp()
        if name == "root_hash_sig_key_desc":
            _read_signature(options, next(given, None), table)
        elif name in _CORRECTION:
            raise NotJudgedError(f"the verity option {name}: blocks cannot be corrected here")
        elif not _read_option(options, name, data_blocks):
            raise _invalid(f"unknown option {_shown(word)}")
    return options


def _read_option(options: Options, name: str, data_blocks: int) -> bool:
    if name in _ON_CORRUPTION:
        if options.on_corruption:
            raise _invalid("two ways of handling corruption")
        options.on_corruption = name
    elif name in _ON_ERROR:
        if options.on_error:
            raise _invalid("two ways of handling errors")
        options.on_error = name
    elif name == "ignore_zero_blocks":
        options.ignore_zero_blocks = True
    elif name == "check_at_most_once":
        # Here every read is verified; that differs only for a device that changes meanwhile, and is too strict then.
        if data_blocks > _INT_MAX:
            raise KernelError(errno.E2BIG, "too large for check_at_most_once", "verity_alloc_most_once")
        options.check_at_most_once = True
    elif name == "try_verify_in_tasklet":
        options.try_verify_in_tasklet = True
    else:
        return False
    return True


def _read_signature(options: Options, description: bytes | None, table: Table) -> None:
    """Read the signature from the key that the table names (``verity_verify_sig_parse_opt_args()``)."""
    if options.key_description is not None:
        raise _invalid("two descriptions of a signature's key")
    if description is None:
        raise _invalid("no description of the signature's key")
    options.signature = table.surroundings.user_key(description)
    options.key_description = description


def _block_size(what: str, word: bytes, device: BlockDevice, largest: int) -> int:
    size = unsigned(word)
    if not size or size & (size - 1) or not device.block_size <= size <= largest:
        raise _invalid(f"{what} block size is {_shown(word)}")
    return size


def _blocks(what: str, word: bytes, block_size: int) -> int:
    number = unsigned_long_long(word)
    if number is None or number * (block_size // SECTOR) >= 1 << 64:
        raise _invalid(f"{what} is {_shown(word)}")
    return number


def _algorithm(word: bytes) -> tuple[str, int]:
    """Return an algorithm's name and the bytes of its digest; ENOENT for what no kernel has."""
    name = word.decode("latin-1")
    try:
        return name, algorithms.digest_size(name)
    except UserError as error:
        # The crypto API also takes the name of a driver, such as sha256-avx2, or of a template.
        if "(" in name or name in algorithms.ALGORITHMS or name.rpartition("-")[0] in algorithms.ALGORITHMS:
            raise NotJudgedError(f"the verity hash algorithm {name!r}: {error}") from None
        raise KernelError(errno.ENOENT, str(error), "crypto_alloc_ahash") from None


def _hexadecimal(what: str, word: bytes, size: int | None = None) -> bytes:
    if not _HEX.fullmatch(word) or (size is not None and len(word) != 2 * size):
        raise _invalid(f"{what} is {_shown(word)}")
    return bytes.fromhex(word.decode())


def _reader(device: BlockDevice) -> Read:
    def read(offset: int, length: int) -> bytes:
        data = device.read(offset, length)
        if len(data) < length:
            raise KernelError(errno.EIO, f"{device.name} ends at byte {offset + len(data)}", "verity_read")
        return data

    return read


def _invalid(reason: str) -> KernelError:
    return KernelError(errno.EINVAL, reason, "verity_ctr")


def _shown(word: bytes) -> str:
    return repr(os.fsdecode(word[:100]))
