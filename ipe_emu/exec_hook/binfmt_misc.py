"""binfmt_misc: interpreters that an administrator registered for other formats (fs/binfmt_misc.c).

Registrations are those of this machine's kernel, which would use them when it carries out a call; so they are judged
as the emulated machine's own. Where the file system is not mounted none are assumed, and `execve` takes care that an
unknown format then fails here, not in the kernel.
"""

import os
from typing import Final

from attrs import frozen

from ipe_emu.errors import NotJudgedError

_DIRECTORY: Final = "/proc/sys/fs/binfmt_misc"
_CONTROL_FILES: Final = frozenset({"register", "status"})


@frozen
class Format:
    """One registration. Either ``extension`` is set, or ``magic`` with ``offset`` and ``mask``."""

    name: str
    interpreter: bytes
    flags: str
    magic: bytes = b""
    mask: bytes = b""
    offset: int = 0
    extension: bytes | None = None

    def matches(self, head: bytes, name: bytes) -> bool:
        """Whether a file that begins with ``head`` and is executed as ``name`` is of this format (``check_file()``)."""
        if self.extension is not None:
            return b"." in name and name.rpartition(b".")[2] == self.extension
        found = head[self.offset : self.offset + len(self.magic)]
        if len(found) < len(self.magic):
            return False
        return all((a ^ b) & m == 0 for a, b, m in zip(found, self.magic, self.mask, strict=True))


def registered(directory: str = _DIRECTORY) -> tuple[Format, ...]:
    """Return the enabled registrations, in no particular order; empty where binfmt_misc is disabled or not mounted."""
    if not os.access(directory + "/status", os.F_OK):  # cheaper than an exception, on every execve(2)
        return ()
    try:
        if _read(directory, "status").strip() != b"enabled":
            return ()
        names = [name for name in os.listdir(directory) if name not in _CONTROL_FILES]  # noqa: PTH208 - a flat list
        formats = [_parse(name, _read(directory, name)) for name in names]
    except OSError as error:
        raise NotJudgedError(f"what is registered in {directory} cannot be read: {error.strerror}") from None
    return tuple(found for found in formats if found is not None)


def match(formats: tuple[Format, ...], head: bytes, name: bytes) -> Format | None:
    """Return the registration that takes a file; None if none does.

    The kernel asks the newest first, an order that its files do not tell: if several match this raises NotJudgedError.
    """
    found = [candidate for candidate in formats if candidate.matches(head, name)]
    if len(found) > 1:
        raise NotJudgedError(f"several registrations of binfmt_misc match: {', '.join(f.name for f in found)}")
    return found[0] if found else None


def _read(directory: str, name: str) -> bytes:
    with open(f"{directory}/{name}", "rb") as stream:  # noqa: PTH123 - on every execve(2)
        return stream.read()


def _parse(name: str, content: bytes) -> Format | None:
    """Parse what the file of a registration says (``entry_status()``); None for a disabled one."""
    lines = content.split(b"\n")
    if lines[0] != b"enabled":
        return None
    fields = {key: value for key, _, value in (line.partition(b" ") for line in lines[1:])}
    flags = fields.get(b"flags:", b"").decode("ascii", "replace")
    interpreter = fields[b"interpreter"]
    if b"extension" in fields:
        return Format(name, interpreter, flags, extension=fields[b"extension"].removeprefix(b"."))
    magic = bytes.fromhex(fields[b"magic"].decode("ascii"))
    mask = bytes.fromhex(fields[b"mask"].decode("ascii")) if b"mask" in fields else b"\xff" * len(magic)
    return Format(name, interpreter, flags, magic, mask, int(fields[b"offset"]))
