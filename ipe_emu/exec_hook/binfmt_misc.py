"""binfmt_misc: interpreters that an administrator registered for other formats (fs/binfmt_misc.c).

Whatever is registered is used when this machine's kernel carries an execve(2) out, so a registration that is not seen
here would run a program that nobody was asked about. Since Linux 6.7 a user namespace can have a registry of its own,
and without one uses its nearest ancestor's (``load_binfmt_misc()``). The rehearsed tree's is given one, empty, before
anything runs in it (`give_own_registry`); nobody can write to it, for it is mounted nowhere, and the hook lets the tree
mount none (`mount.plan_mount`). So nothing is registered, whatever this machine's administrator or the tree does, and
no file has to be looked at to know that.

Before 6.7 there is one registry for all, which nobody but this machine's root can mount or write to. It is judged as
the emulated machine's own.
"""

import errno
import os
import re
from typing import Final

from attrs import frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.linux import mounts

#: The name of the file system.
NAME: Final = b"binfmt_misc"

_DIRECTORY: Final = "/proc/sys/fs/binfmt_misc"
_FILE_SYSTEMS: Final = "/proc/filesystems"
_CONTROL_FILES: Final = frozenset({"register", "status"})
_FIRST_WITH_MANY: Final = (6, 7)


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


def has_registries(release: str) -> bool:
    """Whether on a kernel of this release (uname(2)) every user namespace can have a registry of its own."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _FIRST_WITH_MANY


_HAS_REGISTRIES: Final = has_registries(os.uname().release)


def give_own_registry() -> None:
    """Give this process's user namespace an empty registry, which it keeps for as long as it exists.

    Needs CAP_SYS_ADMIN in it and in that of the mount namespace. OSError if a kernel that could do it does not.
    """
    if not _HAS_REGISTRIES:
        return
    try:
        mounts.new_superblock(NAME)
    except OSError as error:
        if error.errno != errno.ENODEV:  # a kernel without binfmt_misc
            raise


def registered() -> tuple[Format, ...]:
    """Return what is registered and enabled for the rehearsed tree. NotJudgedError if that cannot be known."""
    return () if _HAS_REGISTRIES else registered_for_all()


def registered_for_all(directory: str = _DIRECTORY, file_systems: str = _FILE_SYSTEMS) -> tuple[Format, ...]:
    """Return the enabled registrations of a kernel with one registry, in no particular order.

    NotJudgedError if they cannot be read: where binfmt_misc is not mounted, it may still have some.
    """
    try:
        if not os.access(directory + "/status", os.F_OK):
            if any(line.split()[-1:] == [NAME] for line in _read(file_systems).splitlines()):
                raise NotJudgedError(f"this kernel has {os.fsdecode(NAME)}, and it is not mounted on {directory}")
            return ()
        if _read(f"{directory}/status").strip() != b"enabled":
            return ()
        names = [name for name in os.listdir(directory) if name not in _CONTROL_FILES]  # noqa: PTH208 - a flat list
        formats = [_parse(name, _read(f"{directory}/{name}")) for name in names]
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


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:  # noqa: PTH123 - on every execve(2)
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
