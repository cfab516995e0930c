"""CRC-32C (Castagnoli; RFC 3720, B.4), with neither the first nor the last inversion: what the kernel's crc32c() is."""

from typing import Final

_POLYNOMIAL: Final = 0x82F63B78


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE: Final = tuple(map(_entry, range(256)))


def crc32c(crc: int, data: bytes) -> int:
    """Return the checksum of ``data``, going on from ``crc``."""
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc
