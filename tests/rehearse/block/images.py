"""Disk images for tests, made by the tools that people make them with."""

import subprocess
from pathlib import Path

SFDISK = "/usr/sbin/sfdisk"
MIB = 1 << 20


def disk(path: Path, script: str, size: int = 8 * MIB) -> Path:
    """Make a disk with the partitions of a script of sfdisk(8)."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(
        [SFDISK, "--quiet", "--no-reread", "--no-tell-kernel", path], input=script, text=True, check=True, timeout=30
    )
    return path


class Bytes:
    """A content in memory."""

    read_only = False

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]) if offset >= 0 and length > 0 else b""

    def write(self, offset: int, data: bytes) -> int:
        self.data[offset : offset + len(data)] = data
        return len(data)
