"""One mapped device: its names, its two tables, its state."""

import os

from attrs import define, field

from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.rehearse.block.content import Concatenation, Content
from ipe_emu.rehearse.block.device import DM_MAJOR, BlockDevice, BlockDevices
from ipe_emu.rehearse.device_mapper.ioctl import Block, Flag
from ipe_emu.rehearse.device_mapper.target import Table


@define(eq=False)
class MappedDevice:
    """A mapped device (``struct mapped_device`` and its ``hash_cell``).

    ``block_device`` is in the table of block devices once a first table was loaded (``dm_setup_md_queue()``).
    """

    name: bytes
    uuid: bytes
    minor: int
    _devices: BlockDevices
    active: Table | None = None
    inactive: Table | None = None
    suspended: bool = False
    deferred_remove: bool = False
    registered: bool = False
    event_nr: int = 0
    block_device: BlockDevice = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.block_device = BlockDevice(f"dm-{self.minor}", os.makedev(DM_MAJOR, self.minor), None)

    @property
    def open_count(self) -> int:
        """How often it is open, by programs, file systems and other mapped devices (``dm_open_count()``)."""
        return self.block_device.openers + self._devices.claims(self.block_device)

    def activate(self, table: Table) -> None:
        """Make a table the active one (``dm_swap_table()``); the one before is given back."""
        before, self.active = self.active, table
        contents: tuple[Content, ...] = tuple(target.content for target in table.targets)
        whole = contents[0] if len(contents) == 1 else Concatenation(contents, table.read_only)
        self.block_device.content = whole
        self.block_device.block_size = max(target.block_size for target in table.targets)
        self.block_device.forced_read_only = table.read_only
        if before is not None:
            before.destroy()

    def resume(self) -> None:
        """Let it work (``dm_resume()``), which tells the security modules what it is (``verity_preresume()``)."""
        self.suspended = False
        self.block_device.facts = NO_FACTS if self.active is None else self.active.facts

    def table_event(self) -> None:
        """Count an event of the active table (``dm_table_event()``)."""
        if self.active is not None:
            self.event_nr = (self.event_nr + 1) & 0xFFFFFFFF

    def destroy(self) -> None:
        """Give everything back."""
        for table in (self.active, self.inactive):
            if table is not None:
                table.destroy()
        self.active = self.inactive = None
        self.block_device.content = None
        self.block_device.facts = NO_FACTS

    def table_for(self, block: Block) -> Table | None:
        """Return the table that a command asks about."""
        return self.inactive if block.flags & Flag.QUERY_INACTIVE_TABLE else self.active

    def describe(self, block: Block) -> None:
        """Write its state into a parameter block (``__dev_status()``)."""
        block.set_flags(Flag.SUSPEND | Flag.READONLY | Flag.ACTIVE_PRESENT | Flag.INTERNAL_SUSPEND, to=False)
        if self.suspended:
            block.set_flags(Flag.SUSPEND)
        if self.deferred_remove:
            block.set_flags(Flag.DEFERRED_REMOVE)
        block.dev = self.block_device.number
        block.open_count = self.open_count
        block.event_nr = self.event_nr
        if self.active is not None:
            block.set_flags(Flag.ACTIVE_PRESENT)
        table = self.table_for(block)
        block.target_count = 0 if table is None else len(table.targets)
        if table is not None:
            inactive = bool(block.flags & Flag.QUERY_INACTIVE_TABLE)
            block.set_flags(Flag.READONLY, to=table.read_only if inactive else self.block_device.read_only)

    def identify(self, block: Block) -> None:
        """Write its names into a parameter block (``__find_device_hash_cell()``)."""
        block.name, block.uuid = self.name, self.uuid
        block.set_flags(Flag.INACTIVE_PRESENT, to=self.inactive is not None)
