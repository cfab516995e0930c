"""Asking this machine's device-mapper what a device consists of (include/uapi/linux/dm-ioctl.h)."""

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from attrs import frozen

_CONTROL: Final = "/dev/mapper/control"
_BLOCK_DEVICES: Final = Path("/sys/block")
#: _IOWR(0xfd, 12, struct dm_ioctl)
_DM_TABLE_STATUS: Final = 0xC138FD0C
_STATUS_TABLE_FLAG: Final = 1 << 4
_BUFFER_FULL_FLAG: Final = 1 << 8
# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev,
# name[128], uuid[129], data[7].
_HEADER: Final = struct.Struct("=3IIIIiIIIQ128s129s7x")
_VERSION: Final = (4, 0, 0)
# struct dm_target_spec: sector_start, length, status, next, target_type[16]; its parameters follow, NUL at the end.
_TARGET: Final = struct.Struct("=QQiI16s")
#: Bytes. A table of one dm-verity target has a few hundred.
_ANSWER_SIZE: Final = 1 << 16
#: How cryptsetup names the devices that it makes for dm-verity; device-mapper itself knows no such convention.
_VERITY_UUID: Final = "CRYPT-VERITY-"


@frozen
class Target:
    """One target of a table: its type, such as ``verity``, and its parameters."""

    kind: str
    parameters: str


def verity_table(device: str) -> str | None:
    """Return the parameters of the dm-verity target that block device ``MAJOR:MINOR`` consists of.

    None for every other device. PermissionError where this process may not ask, and the device may be one.
    """
    if not is_device_mapper(device):
        return None
    major, _, minor = device.partition(":")
    try:
        targets = table(os.makedev(int(major), int(minor)))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        uuid = _uuid(device)
        if uuid and not uuid.startswith(_VERITY_UUID):
            return None
        raise PermissionError(error.errno, error.strerror) from None
    # It has no other beside it (DM_TARGET_SINGLETON).
    return targets[0].parameters if len(targets) == 1 and targets[0].kind == "verity" else None


def may_have_verity() -> bool:
    """Whether this machine may have a dm-verity device: False only where it is certain to have none."""
    try:
        if "device-mapper" not in Path("/proc/devices").read_text().split():
            return False
        # Where sysfs is not mounted there is no such directory.
        mapped = [(entry / "dev").read_text().strip() for entry in _BLOCK_DEVICES.iterdir() if (entry / "dm").exists()]
        return any(verity_table(device) is not None for device in mapped)
    except OSError:
        return True


def is_device_mapper(device: str) -> bool:
    """Whether the major number of ``MAJOR:MINOR`` is device-mapper's."""
    return device.partition(":")[0] == _major()


def table(device: int) -> tuple[Target, ...]:
    """Return the active table of a device-mapper device. OSError: ENXIO if there is none, EACCES, ENOENT."""
    request = bytearray(_ANSWER_SIZE)
    _HEADER.pack_into(
        request, 0, *_VERSION, _ANSWER_SIZE, _HEADER.size, 0, 0, _STATUS_TABLE_FLAG, 0, 0, _huge(device), b"", b""
    )
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _DM_TABLE_STATUS, request)
    finally:
        os.close(control)
    return parse_table(bytes(request))


def parse_table(answer: bytes) -> tuple[Target, ...]:
    """Parse the answer to DM_TABLE_STATUS; OSError EIO for one that is none."""
    _, _, _, size, start, count, _, flags, *_ = _HEADER.unpack_from(answer)
    targets = []
    position = start
    for _ in range(count):
        if flags & _BUFFER_FULL_FLAG or position + _TARGET.size > min(size, len(answer)):
            raise OSError(errno.EIO, "device-mapper's answer is cut off")
        _, _, _, following, kind = _TARGET.unpack_from(answer, position)
        parameters = answer[position + _TARGET.size : size].partition(b"\0")[0]
        targets.append(Target(_text(kind.partition(b"\0")[0]), _text(parameters)))
        position = start + following
    return tuple(targets)


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _huge(device: int) -> int:
    """Encode a device number as device-mapper takes them (``huge_encode_dev()``)."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _major() -> str | None:
    """Return the major number of device-mapper's block devices; None while this machine has none."""
    try:
        lines = Path("/proc/devices").read_text().splitlines()
    except OSError:
        return None
    blocks = lines[lines.index("Block devices:") + 1 :] if "Block devices:" in lines else []
    return next((number for number, name in map(str.split, blocks) if name == "device-mapper"), None)


def _uuid(device: str) -> str:
    try:
        return Path(f"/sys/dev/block/{device}/dm/uuid").read_text().strip()
    except OSError:
        return ""
