"""The targets zero and error, and linear: those that need no thought (dm-zero.c, dm-target.c, dm-linear.c)."""

import errno

from attrs import field, frozen

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.rehearse.block.content import SECTOR, Slice
from ipe_emu.rehearse.block.device import BlockDevice
from ipe_emu.rehearse.device_mapper import arguments
from ipe_emu.rehearse.device_mapper.target import Base, Table


@frozen(eq=False)
class _Zeros:
    size: int
    read_only: bool = False

    def read(self, offset: int, length: int) -> bytes:
        return bytes(max(0, min(length, self.size - offset)))

    def write(self, offset: int, data: bytes) -> int:
        return max(0, min(len(data), self.size - offset))


@frozen(eq=False)
class _Errors:
    size: int
    read_only: bool = False

    def read(self, offset: int, length: int) -> bytes:
        if offset >= self.size or not length:
            return b""
        raise KernelError(errno.EIO, "a target of type error is there", "io_err_map")

    def write(self, offset: int, data: bytes) -> int:  # noqa: ARG002 - as every content
        raise KernelError(errno.EIO, "a target of type error is there", "io_err_map")


@frozen(eq=False)
class Zero(Base):
    """The target zero."""

    type = "zero"

    @property
    def content(self) -> _Zeros:
        """Zeros; what is written is forgotten."""
        return _Zeros(self.length * SECTOR)


@frozen(eq=False)
class Error(Base):
    """The target error."""

    type = "error"

    @property
    def content(self) -> _Errors:
        """Nothing that could be read."""
        return _Errors(self.length * SECTOR)


def zero(table: Table, length: int, words: list[bytes]) -> Zero:  # noqa: ARG001 - as every constructor
    """Make a target zero (``zero_ctr()``)."""
    if words:
        raise KernelError(errno.EINVAL, "zero takes no arguments", "zero_ctr")
    return Zero(length)


def error(table: Table, length: int, words: list[bytes]) -> Error:  # noqa: ARG001 - as above
    """Make a target error (``io_err_ctr()``); it ignores arguments."""
    return Error(length)


@frozen(eq=False)
class Linear:
    """A target linear: ``length`` sectors of a device from ``start`` on."""

    device: BlockDevice
    start: int
    length: int
    read_only: bool
    block_size: int = SECTOR
    facts: Facts = NO_FACTS
    type: str = field(default="linear", init=False)

    @property
    def area(self) -> tuple[BlockDevice, int]:
        """See `Target.area`."""
        return self.device, self.start

    @property
    def content(self) -> Slice:
        """The part of the device."""
        return Slice(self.device, self.start * SECTOR, self.length * SECTOR, self.read_only)

    def info(self) -> bytes:
        """Return its status, which is empty."""
        return b""

    def table(self) -> bytes:
        """Return its arguments (``linear_status()``)."""
        return f"{self.device.shown} {self.start}".encode()


def linear(table: Table, length: int, words: list[bytes]) -> Linear:
    """Make a target linear (``linear_ctr()``): device, first sector."""
    if len(words) != 2:
        raise KernelError(errno.EINVAL, "linear takes a device and a sector", "linear_ctr")
    start = arguments.unsigned_long_long(words[1])
    if start is None:
        raise KernelError(errno.EINVAL, f"{words[1]!r} is no sector", "linear_ctr")
    return Linear(table.get_device(words[0]), start, length, table.read_only)
