"""A caller of device-mapper's ioctls in tests: builds parameter blocks as libdevmapper does, and reads answers."""

import errno
import os
import struct
from collections.abc import Sequence
from typing import Any

from attrs import define, field

from ipe_emu.errors import KernelError
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.device_mapper.control import DeviceMapper
from ipe_emu.rehearse.device_mapper.ioctl import Command, Flag
from ipe_emu.rehearse.device_mapper.mapped_device import MappedDevice
from ipe_emu.rehearse.device_mapper.target import Corruption, ReadError
from ipe_emu.rehearse.device_mapper.types import interface_version, target_types
from tests.rehearse.block.images import Bytes

HEADER = struct.Struct("<3IIIIiIIIQ128s129s7x")


@define
class Memory:
    """Memory of the caller: all that is behind it cannot be read."""

    data: bytearray

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self.data):
            raise KernelError(errno.EFAULT, "", "copy_from_user")
        return bytes(self.data[offset : offset + length])


@define
class Surroundings:
    """The caller's files and keys, and what was asked of them."""

    nodes: dict[bytes, int] = field(factory=dict)
    keys: dict[bytes, bytes] = field(factory=dict)
    signed: set[tuple[bytes, bytes]] = field(factory=set)

    def lookup_bdev(self, path: bytes) -> int:
        if path not in self.nodes:
            raise KernelError(errno.ENOENT, "", "lookup_bdev")
        return self.nodes[path]

    def user_key(self, description: bytes) -> bytes:
        if description not in self.keys:
            raise KernelError(errno.ENOKEY, "", "request_key")
        return self.keys[description]

    def verify_root_hash(self, text: bytes, signature: bytes) -> None:
        if (text, signature) not in self.signed:
            raise KernelError(errno.EKEYREJECTED, "", "verify_pkcs7_signature")


@define
class Seen:
    """What an observer is told."""

    said: list[str] = field(factory=list)
    told_udev: list[str] = field(factory=list)

    def appeared(self, device: MappedDevice) -> None:
        self.said.append(f"+{device.block_device.name}")

    def changed(self, device: MappedDevice) -> None:
        self.said.append(f"={os.fsdecode(device.name)}")

    def disappeared(self, device: MappedDevice) -> None:
        self.said.append(f"-{device.block_device.name}")

    def tell_udev(self, device: MappedDevice, action: str, cookie: int) -> None:
        self.told_udev.append(f"{action} {os.fsdecode(device.name)} {cookie}")

    def remark(self, text: str) -> None:
        self.said.append(text)

    def unknown(self, text: str) -> None:
        self.said.append(f"?{text}")

    def faulty(self, fault: Corruption | ReadError) -> None:
        self.said.append(f"{'!' if isinstance(fault, Corruption) else '#'}{fault.device} {fault.action}")


@define
class Reply:
    """What came back; ``data`` is the caller's memory behind the header, cut to the data that it was told of."""

    errno: int
    flags: Flag
    fields: dict[str, Any]
    data: bytes
    memory: bytes


class Machine:
    """Two disks (vda 254:0 with its partitions, vdb), and device-mapper."""

    def __init__(self, kernel: str = "linux-7.3", *, require_signatures: bool = False) -> None:
        self.devices = BlockDevices()
        self.vda = self.devices.add_disk("vda", Bytes(bytes(1 << 20)), ())
        self.vdb = self.devices.add_disk("vdb", Bytes(bytes(range(256)) * 1024), ())
        self.seen = Seen()
        profile = PROFILES[kernel]
        self.version = interface_version(profile)
        self.dm = DeviceMapper(
            self.devices, target_types(profile, require_signatures=require_signatures), self.version, self.seen
        )
        self.caller = Surroundings({b"/dev/vda": self.vda.number, b"/dev/vdb": self.vdb.number})

    def raw(self, request: int, memory: bytes | bytearray, *, capable: bool = True) -> tuple[int, bytearray]:
        """Do one ioctl on memory; return errno and the memory afterwards."""
        after = bytearray(memory)
        answer = self.dm.ioctl(request, Memory(after), capable, self.caller)
        for offset, data in answer.written:
            assert offset + len(data) <= len(after), "written behind the caller's buffer"
            after[offset : offset + len(data)] = data
        return answer.errno, after

    def call(self, command: Command, *, data: bytes = b"", size: int = 16384, **fields: Any) -> Reply:
        """Carry out a command: fields are name, uuid, dev, flags, targets, event_nr."""
        memory = block(data=data, size=size, **fields)
        error, after = self.raw(0xC138FD00 | command, memory)
        return reply(error, after)

    def create(self, name: bytes, *targets: tuple[int, int, bytes, bytes], flags: int = Flag.READONLY) -> Reply:
        """Create a device, load a table and resume, as dmsetup does; stops at what fails."""
        made = self.call(Command.DEV_CREATE, name=name)
        if made.errno:
            return made
        loaded = self.load(name, *targets, flags=flags)
        if loaded.errno:
            self.call(Command.DEV_REMOVE, name=name)
            return loaded
        return self.call(Command.DEV_SUSPEND, name=name)

    def load(self, name: bytes, *targets: tuple[int, int, bytes, bytes], flags: int = Flag.READONLY) -> Reply:
        return self.call(Command.TABLE_LOAD, name=name, flags=flags, targets=len(targets), data=specs(targets))


def block(
    *, data: bytes = b"", size: int = 16384, name: bytes = b"", uuid: bytes = b"", dev: int = 0,
    flags: int = 0, targets: int = 0, event_nr: int = 0, start: int = 312, version: tuple[int, int, int] = (4, 0, 0),
) -> bytearray:  # fmt: skip
    header = HEADER.pack(*version, size, start, targets, 0, flags, event_nr, 0, dev, name, uuid)
    return bytearray(header + data).ljust(size, b"\0")


def specs(targets: Sequence[tuple[int, int, bytes, bytes]]) -> bytes:
    data = b""
    for begin, length, kind, line in targets:
        body = line + b"\0"
        body += bytes(-len(body) % 8)
        data += struct.pack("<QQiI16s", begin, length, 0, 40 + len(body), kind) + body
    return data


def reply(error: int, memory: bytearray) -> Reply:
    (*version, size, start, targets, opened, flags, event, _, dev, name, uuid) = HEADER.unpack_from(
        bytes(memory).ljust(312, b"\0")
    )
    fields = {
        "version": tuple(version), "size": size, "start": start, "targets": targets, "open": opened,
        "event": event, "dev": dev, "name": name.split(b"\0")[0], "uuid": uuid.split(b"\0")[0],
    }  # fmt: skip
    return Reply(error, Flag(flags), fields, bytes(memory[312 : max(size, 312)]), bytes(memory))


def targets_of(found: Reply) -> list[tuple[int, int, bytes, bytes]]:
    """Read what TABLE_STATUS gave."""
    targets = []
    position = 0
    for _ in range(found.fields["targets"]):
        begin, length, _status, following, kind = struct.unpack_from("<QQiI16s", found.data, position)
        line = found.data[position + 40 :].split(b"\0")[0]
        targets.append((begin, length, kind.rstrip(b"\0"), line))
        position = following
    return targets
