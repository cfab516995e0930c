"""The parameter block of device-mapper's ioctls (include/uapi/linux/dm-ioctl.h), and the commands."""

import struct
from enum import IntEnum, IntFlag
from typing import Final

from attrs import define

#: _IOC_TYPE of every command.
DM_IOCTL: Final = 0xFD
_HEADER: Final = struct.Struct("<3IIIIiIIIQ128s129s")
#: Bytes of the block up to its data, and with the part of the data that pads it.
HEADER_SIZE: Final = _HEADER.size
BLOCK_SIZE: Final = 312
VERSION: Final = struct.Struct("<3I")
#: Bytes of a name and of a uuid, the NUL included.
NAME_LEN: Final = 128
UUID_LEN: Final = 129
#: The largest block: DM_MAX_TARGETS times DM_MAX_TARGET_PARAMS.
MOST_TARGETS: Final = 1048576
LARGEST_BLOCK: Final = MOST_TARGETS * 1024


class Command(IntEnum):
    """The commands, by their number (``DM_VERSION_CMD`` and on)."""

    VERSION = 0
    REMOVE_ALL = 1
    LIST_DEVICES = 2
    DEV_CREATE = 3
    DEV_REMOVE = 4
    DEV_RENAME = 5
    DEV_SUSPEND = 6
    DEV_STATUS = 7
    DEV_WAIT = 8
    TABLE_LOAD = 9
    TABLE_CLEAR = 10
    TABLE_DEPS = 11
    TABLE_STATUS = 12
    LIST_VERSIONS = 13
    TARGET_MSG = 14
    DEV_SET_GEOMETRY = 15
    DEV_ARM_POLL = 16
    GET_TARGET_VERSION = 17


#: Commands that use the header alone (IOCTL_FLAGS_NO_PARAMS).
WITHOUT_DATA: Final = frozenset({
    Command.REMOVE_ALL, Command.DEV_CREATE, Command.DEV_REMOVE, Command.DEV_SUSPEND, Command.DEV_STATUS,
    Command.TABLE_CLEAR, Command.DEV_ARM_POLL,
})  # fmt: skip


class Flag(IntFlag):
    """The flags, in both directions."""

    READONLY = 1 << 0
    SUSPEND = 1 << 1
    PERSISTENT_DEV = 1 << 3
    STATUS_TABLE = 1 << 4
    ACTIVE_PRESENT = 1 << 5
    INACTIVE_PRESENT = 1 << 6
    BUFFER_FULL = 1 << 8
    QUERY_INACTIVE_TABLE = 1 << 12
    UEVENT_GENERATED = 1 << 13
    UUID = 1 << 14
    SECURE_DATA = 1 << 15
    DATA_OUT = 1 << 16
    DEFERRED_REMOVE = 1 << 17
    INTERNAL_SUSPEND = 1 << 18
    IMA_MEASUREMENT = 1 << 19


@define
class Block:
    """A parameter block while a command works on it.

    ``capacity`` is how many bytes the caller has room for. ``data`` is what it gave behind the header; results go to
    ``result``, which begins at ``data_start``. ``data_size`` is how many bytes are copied back.
    """

    data_size: int
    data_start: int
    target_count: int
    open_count: int
    flags: int
    event_nr: int
    padding: int
    dev: int
    name: bytes
    uuid: bytes
    capacity: int
    data: bytes = b""
    result: bytes = b""

    @classmethod
    def parse(cls, header: bytes) -> "Block":
        """Read a header of ``HEADER_SIZE`` bytes; strings end at their NUL, or with the field."""
        fields = _HEADER.unpack(header)
        size, start, targets, opened, flags, event, padding, dev, name, uuid = fields[3:]
        return cls(
            size, start, targets, opened, flags, event, padding, dev,
            name[: NAME_LEN - 1].partition(b"\0")[0], uuid[: UUID_LEN - 1].partition(b"\0")[0], size,
        )  # fmt: skip

    def room(self) -> int:
        """Return how many bytes of results fit; sets ``data_start`` to where they begin (``get_result_buffer()``)."""
        self.data_start = min(BLOCK_SIZE, self.capacity)
        return self.capacity - self.data_start

    def put(self, result: bytes) -> None:
        """Set the results, which must fit."""
        self.result = result
        self.data_size = self.data_start + len(result)

    def set_flags(self, flags: int, *, to: bool = True) -> None:
        """Set or clear flags."""
        self.flags = self.flags | flags if to else self.flags & ~flags

    def pack(self, version: tuple[int, int, int]) -> bytes:
        """Return the ``data_size`` bytes that are copied back."""
        header = _HEADER.pack(
            *version, self.data_size, self.data_start, self.target_count & 0xFFFFFFFF, self.open_count,
            self.flags, self.event_nr, self.padding, self.dev, self.name, self.uuid,
        )  # fmt: skip
        whole = header + self.data
        if self.result:
            whole = whole[: self.data_start].ljust(self.data_start, b"\0") + self.result
        return whole[: self.data_size]
