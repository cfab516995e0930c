"""Words and numbers of target lines, as the kernel takes them apart."""

import re
from typing import Final

# isspace() of lib/ctype.c, which knows the no-break space of latin-1
_SPACES: Final = b" \t\n\v\f\r\xa0"
_DIGITS: Final = re.compile(rb"[0-9]+")
_MAJOR_MINOR: Final = re.compile(rb"([0-9]+):([0-9]+)")
_UNSIGNED: Final = 0xFFFFFFFF
# The low 64 bits of a number are decided by as many of its last decimal digits: 10 to the 64th has none of them.
_DIGITS_THAT_COUNT: Final = 64
_UNSIGNED_LONG_LONG: Final = (1 << 64) - 1


def split(line: bytes) -> list[bytes]:
    """Split a target line into its arguments; a backslash quotes the character behind it (``dm_split_args()``)."""
    arguments = []
    position = 0
    while position < len(line):
        if line[position] in _SPACES:
            position += 1
            continue
        word = bytearray()
        while position < len(line) and line[position] not in _SPACES:
            if line[position] == ord("\\") and position + 1 < len(line):
                position += 1
            word.append(line[position])
            position += 1
        arguments.append(bytes(word))
    return arguments


def unsigned(word: bytes) -> int | None:
    """Return what sscanf() makes of ``%u`` if nothing follows, else None. It keeps the low 32 bits."""
    return _number(word) & _UNSIGNED if _DIGITS.fullmatch(word) else None


def unsigned_long_long(word: bytes) -> int | None:
    """Return what sscanf() makes of ``%llu`` if nothing follows, else None. It keeps the low 64 bits."""
    return _number(word) & _UNSIGNED_LONG_LONG if _DIGITS.fullmatch(word) else None


def major_minor(word: bytes) -> tuple[int, int] | None:
    """Return what sscanf() makes of ``%u:%u`` if nothing follows, else None."""
    found = _MAJOR_MINOR.fullmatch(word)
    return (_number(found[1]) & _UNSIGNED, _number(found[2]) & _UNSIGNED) if found else None


def _number(digits: bytes) -> int:
    return int(digits[-_DIGITS_THAT_COUNT:])
