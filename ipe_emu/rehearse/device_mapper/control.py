"""/dev/mapper/control: commands in, answers out (drivers/md/dm-ioctl.c). A state machine without I/O."""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.device_mapper import arguments, ioctl
from ipe_emu.rehearse.device_mapper.ioctl import Block, Command, Flag
from ipe_emu.rehearse.device_mapper.mapped_device import MappedDevice
from ipe_emu.rehearse.device_mapper.populate import SPEC, check_limits, populate
from ipe_emu.rehearse.device_mapper.target import Corruption, ReadError, Surroundings, Table, TargetTypes

#: Larger blocks than this are refused: no tool makes them, and a table of ours would fill memory with them.
_LARGEST_EMULATED: Final = 16 << 20
_MOST_MINORS: Final = 1 << 20
_FORBIDDEN_NAMES: Final = frozenset({b"control", b".", b".."})
_HAS_UUID: Final = 1
_DOESNT_HAVE_UUID: Final = 2
#: Commands whose failure it logs (DMERR).
_LOGGED: Final = frozenset({Command.DEV_SUSPEND, Command.TABLE_LOAD, Command.DEV_RENAME, Command.TARGET_MSG})
_U64: Final = struct.Struct("<Q")
_NAME_LIST: Final = struct.Struct("<QI")
_EVENT_AND_FLAGS: Final = struct.Struct("<II")
_VERSIONS: Final = struct.Struct("<IIII")
_DEPS: Final = struct.Struct("<II")


class Memory(Protocol):
    """The parameter block in its caller's memory."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of it; KernelError EFAULT where they are not all there."""


class Observer(Protocol):
    """Who is told what becomes of devices, while the command is being carried out."""

    def appeared(self, device: MappedDevice) -> None:
        """The kernel has registered a disk for it: /dev/dm-N and /sys/block/dm-N are there."""

    def changed(self, device: MappedDevice) -> None:
        """It has another table, state or name."""

    def disappeared(self, device: MappedDevice) -> None:
        """It is no more."""

    def tell_udev(self, device: MappedDevice, action: str, cookie: int) -> None:
        """The driver itself has something to tell; ``cookie`` is the caller's, by which he waits for udev, or 0."""

    def faulty(self, fault: Corruption | ReadError) -> None:
        """A verity device was read where it is corrupted, or cannot be read; from any thread."""

    def remark(self, text: str) -> None:
        """A table does something otherwise than a kernel's would."""

    def unknown(self, text: str) -> None:
        """What a kernel's table would have done cannot be known."""


@frozen
class Answer:
    """What an ioctl returns: an errno, 0 for success, and what was written to the caller's memory all the same."""

    errno: int
    written: tuple[tuple[int, bytes], ...] = ()
    reason: str = ""


@define(eq=False)
class DeviceMapper:
    """The driver. ``version`` is that of the ioctl interface. Commands may come from one thread only."""

    devices: BlockDevices
    types: TargetTypes
    version: tuple[int, int, int]
    observer: Observer
    _mapped: list[MappedDevice] = field(factory=list, init=False)
    _lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    def __iter__(self) -> Iterator[MappedDevice]:
        """Yield the devices by name."""
        with self._lock:
            return iter(sorted(self._mapped, key=lambda device: device.name))

    def ioctl(self, request: int, memory: Memory, capable: bool, surroundings: Surroundings) -> Answer:
        """Carry out one ioctl (``ctl_ioctl()``); ``capable`` is whether the caller has CAP_SYS_ADMIN.

        NotJudgedError for what is not emulated; the caller's memory is as it was then.
        """
        if not capable:
            return Answer(errno.EACCES, reason="CAP_SYS_ADMIN is missing")
        if request >> 8 & 0xFF != ioctl.DM_IOCTL:
            return Answer(errno.ENOTTY, reason="no command of device-mapper")
        written: list[tuple[int, bytes]] = []
        try:
            with self._lock:
                self._ioctl(request & 0xFF, memory, surroundings, written)
        except KernelError as error:
            return Answer(error.errno, tuple(written), error.reason)
        return Answer(0, tuple(written))

    def logs_failure_of(self, request: int) -> bool:
        """Whether the kernel logs why an ioctl failed."""
        return request & 0xFF in _LOGGED

    def closed(self, number: int) -> None:
        """Remove the device of that number if that was only to be done once nobody has it open (``dm_blk_close()``)."""
        with self._lock:
            for device in [d for d in self._mapped if d.block_device.number == number]:
                if device.deferred_remove and not device.open_count:
                    self._remove(device)

    def finish(self) -> None:
        """Hear that the machine has ended, and nobody will read any more."""
        for device in self:
            if device.active is not None:
                device.active.finish()

    # -- the frame of every command -----------------------------------------------------------------------------

    def _ioctl(self, number: int, memory: Memory, surroundings: Surroundings, written: list[tuple[int, bytes]]) -> None:
        theirs = ioctl.VERSION.unpack(memory.read(0, ioctl.VERSION.size))
        written.append((0, ioctl.VERSION.pack(*self.version)))  # check_version() writes it in any case
        if theirs[0] != self.version[0] or theirs[1] > self.version[1]:
            raise KernelError(errno.EINVAL, f"the caller speaks version {theirs[0]}.{theirs[1]}", "check_version")
        if number == Command.VERSION:
            return
        try:
            command = Command(number)
        except ValueError:
            raise KernelError(errno.ENOTTY, f"no command {number}", "lookup_ioctl") from None
        block, whole = self._copy_params(command, memory, written)
        _validate(command, block)
        self._carry_out(command, block, whole, surroundings)
        written.append((0, block.pack(self.version)))

    def _copy_params(self, command: Command, memory: Memory, written: list[tuple[int, bytes]]) -> tuple[Block, bytes]:
        """Read the block, or its header alone (``copy_params()``); return it as a whole too."""
        header = memory.read(0, ioctl.HEADER_SIZE)
        block = Block.parse(header)
        if not ioctl.HEADER_SIZE <= block.data_size <= ioctl.LARGEST_BLOCK:
            raise KernelError(errno.EINVAL, f"a block of {block.data_size} bytes", "copy_params")
        if block.data_size > _LARGEST_EMULATED:
            raise NotJudgedError(f"a device-mapper command with {block.data_size} bytes of data")
        size = block.data_size
        if command in ioctl.WITHOUT_DATA:
            block.capacity = ioctl.HEADER_SIZE
        else:
            block.data = memory.read(ioctl.HEADER_SIZE, size - ioctl.HEADER_SIZE)
        if block.flags & Flag.SECURE_DATA:
            written.append((0, bytes(size)))
        block.data_size = ioctl.HEADER_SIZE
        return block, header + block.data

    def _carry_out(self, command: Command, block: Block, whole: bytes, surroundings: Surroundings) -> None:
        if command == Command.TABLE_LOAD:
            self._table_load(block, whole, surroundings)
        elif command == Command.DEV_RENAME:
            self._dev_rename(block, whole)
        elif command == Command.TARGET_MSG:
            self._target_message(block, whole)
        elif command in _SIMPLE:
            _SIMPLE[command](self, block)
        else:
            raise NotJudgedError(f"the device-mapper command {command.name}")

    # -- finding ------------------------------------------------------------------------------------------------

    def _by_name(self, name: bytes) -> MappedDevice | None:
        return next((device for device in self._mapped if device.name == name), None)

    def _by_uuid(self, uuid: bytes) -> MappedDevice | None:
        return next((device for device in self._mapped if device.uuid == uuid), None)

    def _find(self, block: Block) -> MappedDevice:
        """Find the device by uuid, name or number, only one of which may be given (``__find_device_hash_cell()``)."""
        found = None
        if block.uuid:
            if not (block.name or block.dev):
                found = self._by_uuid(block.uuid)
        elif block.name:
            if not block.dev:
                found = self._by_name(block.name)
        elif block.dev:
            number = block.dev & 0xFFFFFFFF
            found = next((device for device in self._mapped if device.block_device.number == number), None)
        if found is None:
            raise KernelError(errno.ENXIO, "there is no such device", "__find_device_hash_cell")
        found.identify(block)
        return found

    # -- devices ------------------------------------------------------------------------------------------------

    def _remove_all(self, block: Block) -> None:
        """Remove all devices that nobody has open, those that use others first (``dm_hash_remove_all()``)."""
        progress = True
        while progress:
            progress = False
            for device in self:
                if not device.open_count:
                    self._remove(device)
                    progress = True
                elif block.flags & Flag.DEFERRED_REMOVE:
                    device.deferred_remove = True
        block.data_size = 0

    def _dev_create(self, block: Block) -> None:
        _check_name(block.name)
        minor = None
        if block.flags & Flag.PERSISTENT_DEV:
            minor = os.minor(block.dev & 0xFFFFFFFF)
        taken = {device.minor for device in self._mapped}
        if minor is None:
            minor = next(number for number in range(_MOST_MINORS) if number not in taken)
        elif minor in taken:
            raise KernelError(errno.EBUSY, f"the minor number {minor} is taken", "specific_minor")
        if self._by_name(block.name) or (block.uuid and self._by_uuid(block.uuid)):
            raise KernelError(errno.EBUSY, "the name or the uuid is taken", "dm_hash_insert")
        device = MappedDevice(block.name, block.uuid, minor, self.devices)
        self._mapped.append(device)
        block.set_flags(Flag.INACTIVE_PRESENT, to=False)
        device.describe(block)

    def _dev_remove(self, block: Block) -> None:
        device = self._find(block)
        if device.open_count:
            if not block.flags & Flag.DEFERRED_REMOVE:
                raise KernelError(errno.EBUSY, "the device is open", "dm_lock_for_deletion")
            device.deferred_remove = True
            return
        if device.registered:
            self.observer.tell_udev(device, "remove", block.event_nr)
        self._remove(device)
        block.set_flags(Flag.DEFERRED_REMOVE, to=False)
        block.set_flags(Flag.UEVENT_GENERATED)

    def _remove(self, device: MappedDevice) -> None:
        self._mapped.remove(device)
        if device.registered:
            self.devices.remove(device.block_device)
            self.observer.disappeared(device)
        device.destroy()

    def _dev_rename(self, block: Block, whole: bytes) -> None:
        by_uuid = bool(block.flags & Flag.UUID)
        new = _string(whole, block.data_start)
        if not new or len(new) > (ioctl.UUID_LEN if by_uuid else ioctl.NAME_LEN) - 1:
            raise KernelError(errno.EINVAL, "no new name, or one too long", "dev_rename")
        if not by_uuid:
            _check_name(new)
        if (self._by_uuid if by_uuid else self._by_name)(new):
            raise KernelError(errno.EBUSY, "the new name is taken", "dm_hash_rename")
        device = self._by_name(block.name)
        if device is None:
            raise KernelError(errno.ENXIO, "there is no such device", "dm_hash_rename")
        if by_uuid and device.uuid:
            raise KernelError(errno.EINVAL, "the device has a uuid", "dm_hash_rename")
        if by_uuid:
            device.uuid = new
        else:
            device.name = new
        device.table_event()
        block.set_flags(Flag.UEVENT_GENERATED)
        cookie = block.event_nr
        device.describe(block)
        self.observer.changed(device)
        if device.registered:
            self.observer.tell_udev(device, "change", cookie)

    def _dev_suspend(self, block: Block) -> None:
        cookie = block.event_nr
        device = self._find(block)
        if block.flags & Flag.SUSPEND:
            device.suspended = True
        else:
            self._resume(device, block)
        device.describe(block)
        self.observer.changed(device)
        if block.flags & Flag.UEVENT_GENERATED:
            self.observer.tell_udev(device, "change", cookie)

    def _resume(self, device: MappedDevice, block: Block) -> None:
        """Make the inactive table the active one, if there is one, and go on (``do_resume()``)."""
        table, device.inactive = device.inactive, None
        block.set_flags(Flag.INACTIVE_PRESENT, to=False)
        if table is not None:
            device.suspended = True
            try:
                check_limits(table)
            except KernelError:
                table.destroy()
                raise
            device.activate(table)
        if device.suspended:
            if device.active is None:
                raise KernelError(errno.EINVAL, "the device has no table", "dm_resume")
            device.resume()
            block.set_flags(Flag.UEVENT_GENERATED)

    def _dev_status(self, block: Block) -> None:
        self._find(block).describe(block)

    def _dev_wait(self, block: Block) -> None:
        device = self._find(block)
        if device.event_nr == block.event_nr:
            raise NotJudgedError("waiting for an event of a mapped device, which here never comes")
        device.describe(block)
        self._retrieve_status(device.table_for(block), block)

    def _dev_arm_poll(self, block: Block) -> None:
        """Do nothing: there are no events to poll for."""

    # -- tables -------------------------------------------------------------------------------------------------

    def _table_load(self, block: Block, whole: bytes, surroundings: Surroundings) -> None:
        device = self._find(block)
        table = Table(
            self.devices,
            self,
            device.block_device.number,
            os.fsdecode(device.name),
            bool(block.flags & Flag.READONLY),
            surroundings,
            self.observer.faulty,
            self.observer.remark,
            self.observer.unknown,
        )
        try:
            populate(table, self.types, block, whole)
            self._check_immutable(device, table)
            if not device.registered:
                check_limits(table)
        except BaseException:
            table.destroy()
            raise
        if device.inactive is not None:
            device.inactive.destroy()
        device.inactive = table
        block.set_flags(Flag.INACTIVE_PRESENT)
        if not device.registered:
            device.registered = True
            self.devices.add(device.block_device)
            self.observer.appeared(device)
        device.describe(block)

    def _check_immutable(self, device: MappedDevice, table: Table) -> None:
        now = device.active.targets[0].type if device.active is not None else None
        new = table.targets[0].type
        if now is not None and self.types[now].immutable and new not in {now, "error"}:
            raise KernelError(errno.EINVAL, f"a {now} device stays one", "table_load")

    def _table_clear(self, block: Block) -> None:
        device = self._find(block)
        if device.inactive is not None:
            device.inactive.destroy()
            device.inactive = None
        block.set_flags(Flag.INACTIVE_PRESENT, to=False)
        device.describe(block)

    def _table_deps(self, block: Block) -> None:
        device = self._find(block)
        device.describe(block)
        table = device.table_for(block)
        if table is None:
            return
        room = block.room()
        result = _DEPS.pack(len(table.used), 0) + b"".join(_U64.pack(used.number) for used in table.used)
        _put(block, result, room)

    def _table_status(self, block: Block) -> None:
        device = self._find(block)
        device.describe(block)
        self._retrieve_status(device.table_for(block), block)

    def _retrieve_status(self, table: Table | None, block: Block) -> None:
        """Write the status or the arguments of all targets, as many as there is room for (``retrieve_status()``)."""
        if table is None:
            return
        if block.flags & Flag.IMA_MEASUREMENT and not block.flags & Flag.STATUS_TABLE:
            raise NotJudgedError("the state of a mapped device as IMA measures it")
        room = block.room()
        found = bytearray()
        used = 0
        begin = 0
        for target in table.targets:
            start = len(found)
            line = target.table() if block.flags & Flag.STATUS_TABLE else target.info()
            # The line is cut to what is left, less its NUL; one that fills it counts as cut.
            if room - start <= SPEC.size or len(line) + 1 >= room - start - SPEC.size:
                block.set_flags(Flag.BUFFER_FULL)
                break
            found += SPEC.pack(begin, target.length, 0, 0, target.type.encode()) + line + b"\0"
            used = len(found)
            begin += target.length
            found += bytes(-len(found) % 8)
            if len(found) > room:
                block.set_flags(Flag.BUFFER_FULL)
                break
            found[start + 20 : start + 24] = len(found).to_bytes(4, "little")
        if used:
            block.put(bytes(found[:used]))
        block.target_count = len(table.targets)

    # -- lists --------------------------------------------------------------------------------------------------

    def _list_devices(self, block: Block) -> None:
        with_uuid = bool(block.flags & Flag.UUID)
        entries = [
            _device_entry(device, with_uuid)
            for device in self
            if device.name.startswith(block.name) and device.uuid.startswith(block.uuid)
        ]
        room = block.room()
        if room < _U64.size:
            block.set_flags(Flag.BUFFER_FULL)
            return
        _put(block, b"".join(_chained(entries, 8)), room)

    def _list_versions(self, block: Block) -> None:
        _put_versions(block, self.types, sorted(self.types))

    def _get_target_version(self, block: Block) -> None:
        name = os.fsdecode(block.name)
        if name not in self.types:
            raise KernelError(errno.EINVAL, f"unknown target type {name!r}", "get_target_version")
        _put_versions(block, self.types, [name])

    # -- messages -----------------------------------------------------------------------------------------------

    def _target_message(self, block: Block, whole: bytes) -> None:
        device = self._find(block)
        text = _string(whole, block.data_start + 8)  # behind the sector
        if text is None:
            raise KernelError(errno.EINVAL, "no message, or one without an end", "target_message")
        words = arguments.split(text)
        if words and words[0].lower() == b"@cancel_deferred_remove" and len(words) == 1:
            device.deferred_remove = False
            device.describe(block)
            return
        if words and words[0].lower().startswith(b"@stats"):
            raise NotJudgedError("statistics of a mapped device")
        raise KernelError(errno.EINVAL, "the target takes no messages", "target_message")


def _validate(command: Command, block: Block) -> None:
    """Check names and clear flags (``validate_params()``)."""
    block.set_flags(Flag.BUFFER_FULL | Flag.UEVENT_GENERATED | Flag.SECURE_DATA | Flag.DATA_OUT, to=False)
    if command in {Command.REMOVE_ALL, Command.LIST_DEVICES, Command.LIST_VERSIONS}:
        return
    if command == Command.DEV_CREATE:
        if not block.name:
            raise KernelError(errno.EINVAL, "a device without a name", "validate_params")
    elif block.uuid and block.name:
        raise KernelError(errno.EINVAL, "both a name and a uuid", "validate_params")


def _put(block: Block, result: bytes, room: int) -> None:
    if len(result) > room:
        block.set_flags(Flag.BUFFER_FULL)
    else:
        block.put(result)


def _chained(entries: list[bytes], offset: int) -> list[bytes]:
    """Write the length of each entry but the last into it at ``offset``: where the next one begins."""
    return [
        entry[:offset] + len(entry).to_bytes(4, "little") + entry[offset + 4 :] if index + 1 < len(entries) else entry
        for index, entry in enumerate(entries)
    ]


def _device_entry(device: MappedDevice, with_uuid: bool) -> bytes:
    entry = _aligned(_NAME_LIST.pack(device.block_device.number, 0) + device.name + b"\0")
    flags = (_HAS_UUID if device.uuid else _DOESNT_HAVE_UUID) if with_uuid else 0
    entry += _EVENT_AND_FLAGS.pack(device.event_nr, flags)
    return entry + _aligned(device.uuid + b"\0") if with_uuid and device.uuid else entry


def _put_versions(block: Block, types: TargetTypes, names: list[str]) -> None:
    room = block.room()
    entries = [_aligned(_VERSIONS.pack(0, *types[name].version) + name.encode() + b"\0") for name in names]
    # The kernel reckons with the worst alignment, and gives back all that it reckoned with.
    needed = sum(_VERSIONS.size + len(name) + 1 + 7 for name in names)
    _put(block, b"".join(_chained(entries, 0)).ljust(needed, b"\0"), room)


def _aligned(entry: bytes) -> bytes:
    return entry + bytes(-len(entry) % 8)


def _check_name(name: bytes) -> None:
    if b"/" in name or name in _FORBIDDEN_NAMES:
        raise KernelError(errno.EINVAL, f"no device can be called {os.fsdecode(name)!r}", "check_name")


def _string(whole: bytes, start: int) -> bytes | None:
    """Return the string at ``start`` of a parameter block, which lies in its data; None if there is none."""
    end = whole.find(b"\0", start) if start >= ioctl.HEADER_SIZE else -1
    return None if end < 0 else whole[start:end]


_SIMPLE: Final[dict[Command, Callable[[DeviceMapper, Block], None]]] = {
    Command.REMOVE_ALL: DeviceMapper._remove_all,
    Command.LIST_DEVICES: DeviceMapper._list_devices,
    Command.DEV_CREATE: DeviceMapper._dev_create,
    Command.DEV_REMOVE: DeviceMapper._dev_remove,
    Command.DEV_SUSPEND: DeviceMapper._dev_suspend,
    Command.DEV_STATUS: DeviceMapper._dev_status,
    Command.DEV_WAIT: DeviceMapper._dev_wait,
    Command.DEV_ARM_POLL: DeviceMapper._dev_arm_poll,
    Command.TABLE_CLEAR: DeviceMapper._table_clear,
    Command.TABLE_DEPS: DeviceMapper._table_deps,
    Command.TABLE_STATUS: DeviceMapper._table_status,
    Command.LIST_VERSIONS: DeviceMapper._list_versions,
    Command.GET_TARGET_VERSION: DeviceMapper._get_target_version,
}
