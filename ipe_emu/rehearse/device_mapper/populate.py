"""Reading a table from the data of TABLE_LOAD (``populate_table()``), and checking it as a whole."""

import errno
import os
import struct
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.rehearse.block.content import SECTOR
from ipe_emu.rehearse.device_mapper.arguments import split
from ipe_emu.rehearse.device_mapper.ioctl import BLOCK_SIZE, MOST_TARGETS, Block
from ipe_emu.rehearse.device_mapper.target import NOT_EMULATED, Table, TargetTypes

#: struct dm_target_spec: first sector, length, status, next, type.
SPEC: Final = struct.Struct("<QQiI16s")
# LLONG_MAX >> SECTOR_SHIFT
_MOST_SECTORS: Final = ((1 << 63) - 1) // SECTOR


def populate(table: Table, types: TargetTypes, block: Block, memory: bytes) -> None:
    """Add the targets in ``memory``, a whole parameter block, to a table.

    KernelError as the kernel; NotJudgedError for target types that are not emulated.
    """
    if block.target_count > MOST_TARGETS:
        raise KernelError(errno.EOVERFLOW, f"a table of {block.target_count} targets", "dm_table_create")
    if not block.target_count:
        raise _invalid("a table without targets")
    here, following, smallest = 0, block.data_start, BLOCK_SIZE
    for _ in range(block.target_count):
        if following < smallest:
            raise _invalid("a target overlaps the one before it")
        if len(memory) - here - SPEC.size <= following or following % 8:
            raise _invalid("a target is not in the buffer, or not aligned")
        here += following
        begin, length, _status, following, name = SPEC.unpack_from(memory, here)
        end = memory.find(b"\0", here + SPEC.size)
        if end < 0:
            raise _invalid("arguments without an end")
        smallest = end - here + 1
        _add_target(table, types, begin, length, name, memory[here + SPEC.size : end])


def _add_target(table: Table, types: TargetTypes, begin: int, length: int, raw_name: bytes, line: bytes) -> None:
    """Add one target (``dm_table_add_target()``)."""
    if table.targets and types[table.targets[0].type].singleton:
        raise _invalid(f"a target {table.targets[0].type} is alone in its table")
    if not length or begin + length > _MOST_SECTORS:
        raise _invalid("a target of no length, or an impossible one")
    name = os.fsdecode(raw_name.partition(b"\0")[0])
    target_type = types.get(name)
    if target_type is None:
        if name in NOT_EMULATED:
            raise NotJudgedError(f"a device-mapper target of type {name}, which is not emulated")
        raise _invalid(f"unknown target type {name!r}")
    if table.targets and (target_type.singleton or target_type.immutable):
        raise _invalid(f"a target {name} is alone in its table")
    if begin != table.sectors:
        raise _invalid("a gap between targets")
    table.targets.append(target_type.constructor(table, length, split(line)))


def check_limits(table: Table) -> None:
    """Raise KernelError EINVAL unless all devices are as long as what is mapped (``dm_calculate_queue_limits()``)."""
    for target in table.targets:
        if target.area is None:
            continue
        device, start = target.area
        if device.sectors and start + target.length > device.sectors:
            raise KernelError(
                errno.EINVAL,
                f"{device.name} has {device.sectors} sectors, and {start + target.length} are mapped",
                "device_area_is_invalid",
            )
    largest = max(target.block_size for target in table.targets) // SECTOR
    position = 0
    for target in table.targets:
        # A block that begins in one target and ends in the next must fit the next one's blocks.
        left = -position % largest
        if left < target.length and left % (target.block_size // SECTOR):
            break
        position += target.length
    if position % largest or position != table.sectors:
        raise KernelError(
            errno.EINVAL, "targets that do not end with a block", "validate_hardware_logical_block_alignment"
        )


def _invalid(reason: str) -> KernelError:
    return KernelError(errno.EINVAL, reason, "populate_table")
