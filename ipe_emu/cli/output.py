"""What the commands print: messages on stderr, and names of files that cannot break a line or a terminal."""

import sys
from typing import TYPE_CHECKING

from ipe_emu.profiles import DEFAULT_PROFILE, PROFILES, Profile

if TYPE_CHECKING:
    from ipe_emu.integrity.facts import Facts

_NOTES = {
    "op-policy": "linux-7.3 plus a proposal that no released kernel has: op=POLICY can admit unsigned policies",
}


def escape(name: bytes | str) -> str:
    r"""Return ``name`` with the backslash and every byte that is not printable UTF-8 as ``\\``, ``\n`` or ``\xNN``."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character == "\\":
        return r"\\"
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as surrogateescape keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def known(facts: "Facts") -> list[str]:
    """What is known of a file, a word or a few for each fact."""
    words = ["boot_verified"] if facts.boot_verified else []
    if facts.dmverity_roothash is not None:
        words.append(f"dm-verity {facts.dmverity_roothash}" + " (signed)" * facts.dmverity_signature)
    if facts.fsverity_digest is not None:
        words.append(f"fs-verity {facts.fsverity_digest}" + " (signed)" * facts.fsverity_signature)
    words += [f"in doubt: {doubt}" for doubt in (facts.dmverity_in_doubt, facts.fsverity_in_doubt) if doubt is not None]
    return words


def say(message: str) -> None:
    """Print a remark on stderr."""
    print(f"ipe-emu: {message}", file=sys.stderr, flush=True)


def print_bytes(data: bytes) -> None:
    """Print on stdout what need not be text, whole: with PYTHONUNBUFFERED a write may take a part of it."""
    sys.stdout.flush()
    rest = memoryview(data)
    while rest:
        rest = rest[sys.stdout.buffer.write(rest) :]
    sys.stdout.buffer.flush()


def complain(message: str) -> None:
    """Print an error on stderr."""
    say(f"error: {message}")


def announce(name: str | None) -> Profile:
    """Say first which kernel is emulated (None: the default one), and return its profile."""
    name = name or DEFAULT_PROFILE.name
    note = _NOTES.get(name)
    say(f"kernel profile {name}" + (f" ({note})" if note else ""))
    return PROFILES[name]
