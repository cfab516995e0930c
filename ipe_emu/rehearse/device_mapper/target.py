"""What a target is, and what it gets to be made from."""

import errno
import os
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from attrs import define, field, frozen

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.rehearse.block.content import SECTOR, Content
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.device_mapper import arguments


class Surroundings(Protocol):
    """What a command needs to know of its caller."""

    def lookup_bdev(self, path: bytes) -> int:
        """Return the number of the block device at a path. KernelError as the kernel: ENOENT, ENOTBLK, EACCES."""

    def user_key(self, description: bytes) -> bytes:
        """Return the payload of the caller's key of type "user". KernelError ENOKEY; NotJudgedError if uncertain."""

    def verify_root_hash(self, text: bytes, signature: bytes) -> None:
        """Raise KernelError unless a trusted key has signed a root hash, given as it stands in the table."""


@frozen
class Corruption:
    """A block that a verity device found corrupted; ``action`` is what its table says is then done.

    ``data_device`` is the number of the device with the data, as the kernel's log has it.
    ``eio``, ``ignore``, ``restart`` or ``panic``.
    """

    device: str
    data_device: str
    reason: str
    action: str


@frozen
class ReadError:
    """What a verity device could not read, though not for corruption; ``action`` is what its table says is then done.

    ``restart`` or ``panic``.
    """

    device: str
    reason: str
    action: str


@define
class Table:
    """A table while it is made, and afterwards. ``owner`` is the number of the device that it is for.

    All devices that it maps are claimed until ``destroy``.
    """

    devices: BlockDevices
    holder: object
    owner: int
    owner_name: str
    read_only: bool
    surroundings: Surroundings
    faulty: Callable[[Corruption | ReadError], None]
    #: Is told of what a target does otherwise than a kernel's, and all the same goes on.
    remark: Callable[[str], None]
    #: Is told, from any thread, of what cannot be known of a kernel's.
    not_judged: Callable[[str], None]
    targets: list["Target"] = field(factory=list)
    #: The newest first, as ``dm_get_device()`` keeps them.
    used: list[BlockDevice] = field(factory=list)
    #: What is to be done before the devices are given back.
    at_end: list[Callable[[], None]] = field(factory=list)

    def get_device(self, path: bytes) -> BlockDevice:
        """Open a device that a target names, and claim it (``dm_get_device()``).

        KernelError: EOVERFLOW, EINVAL for the device that the table is for, ENXIO, EBUSY, and as ``lookup_bdev``.
        """
        numbers = arguments.major_minor(path)
        if numbers is None:
            number = self.surroundings.lookup_bdev(path)
        else:
            major, minor = numbers
            if major >= 1 << 12 or minor >= 1 << 20:
                raise KernelError(errno.EOVERFLOW, f"no device has the number {major}:{minor}", "dm_devt_from_path")
            number = os.makedev(major, minor)
        if number == self.owner:
            raise KernelError(errno.EINVAL, "a device cannot be mapped onto itself", "dm_get_device")
        device = self.devices.find(number)
        if device is None:
            raise KernelError(errno.ENXIO, f"there is no device {os.fsdecode(path)}", "open_table_device")
        if device not in self.used:
            self.devices.claim(device, self.holder)
            self.used.insert(0, device)
        return device

    def destroy(self) -> None:
        """Give the devices back (``dm_table_destroy()``)."""
        self.finish()
        for device in self.used:
            self.devices.release(device, self.holder)
        self.used.clear()

    def finish(self) -> None:
        """Hear that nobody will read any more."""
        for act in self.at_end:
            act()
        self.at_end.clear()

    @property
    def sectors(self) -> int:
        """How long the device is that it makes, in 512 bytes."""
        return sum(target.length for target in self.targets)

    @property
    def facts(self) -> Facts:
        """What the device's security blob says. A target that has something to say is alone in its table."""
        return self.targets[0].facts if self.targets else NO_FACTS


class Target(Protocol):
    """A target of a table; ``begin`` and ``length`` count 512 bytes."""

    @property
    def type(self) -> str:
        """The name of its type."""

    @property
    def length(self) -> int:
        """How much of the device it makes."""

    @property
    def block_size(self) -> int:
        """Its logical block size in bytes."""

    @property
    def area(self) -> tuple[BlockDevice, int] | None:
        """The device of which it maps ``length`` sectors, and the first of them; None if none."""

    @property
    def content(self) -> Content:
        """What can be read from it."""

    @property
    def facts(self) -> Facts:
        """What it tells the security modules."""

    def info(self) -> bytes:
        """Return its status (STATUSTYPE_INFO)."""

    def table(self) -> bytes:
        """Return its arguments (STATUSTYPE_TABLE)."""


#: Makes a target of a length (in 512 bytes) and its arguments. KernelError as its constructor in the kernel.
Constructor = Callable[[Table, int, list[bytes]], Target]


@frozen
class TargetType:
    """A target type: ``version`` as LIST_VERSIONS gives it.

    ``singleton``: alone in its table. ``immutable``: a device that has it never gets another type.
    """

    name: str
    version: tuple[int, int, int]
    constructor: Constructor
    singleton: bool = False
    immutable: bool = False


#: Target types that kernels have and that are not emulated.
NOT_EMULATED: Final = frozenset({
    "striped", "snapshot", "snapshot-origin", "snapshot-merge", "mirror", "raid", "multipath", "thin", "thin-pool",
    "cache", "writecache", "integrity", "era", "clone", "delay", "flakey", "dust", "log-writes", "switch",
    "unstriped", "zoned", "ebs", "vdo",
})  # fmt: skip

TargetTypes = Mapping[str, TargetType]


@frozen(eq=False)
class Base:
    """What simple targets have in common: nothing is mapped, and nothing said."""

    length: int
    block_size: int = SECTOR
    area: tuple[BlockDevice, int] | None = None
    facts: Facts = NO_FACTS

    def info(self) -> bytes:
        """Return its status, which is empty."""
        return b""

    def table(self) -> bytes:
        """Return its arguments, of which it has none."""
        return b""
