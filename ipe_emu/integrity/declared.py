"""Declared facts: what ``--integrity FILE.toml`` and ``--boot-verified PATH`` say of files.

A fact attaches to what its path names when it is loaded, never to the string: to a directory tree of a file system,
or to one inode. So it holds through every bind mount and in every mount namespace, as IPE's properties do, and
something that is mounted over the path does not inherit it.
"""

import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, evolve, field, frozen

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity import fsverity
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.sources import OpenFile, Place, tells_changes

#: A file of facts larger than this is not one.
MAX_FILE_SIZE = 1 << 20
_DIGEST = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}:(?:[0-9a-fA-F]{2}){1,64}", re.ASCII)

#: Tells where an existing file lies, by its absolute path free of symbolic links; OSError where it cannot.
Locate = Callable[[bytes], Place]


@frozen
class Entry:
    """One ``[[file]]``: a file, or a directory with everything below it. ``path`` is where it was found."""

    path: bytes
    facts: Facts
    is_directory: bool
    place: Place
    ino: int


@define
class _Content:
    """The state of a sealed file when its digest was last computed; a change makes the emulator compute it again."""

    signature: tuple[int, int, int]
    intact: bool


def _signature(st: os.stat_result) -> tuple[int, int, int]:
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


@frozen(eq=False)
class Declared:
    """All declared facts. The entry with the longest path decides alone; whatever it does not say is false.

    ``volumes_are_mounts`` says that each directory with a dm-verity fact is a mount of its own, as in a sandbox: the
    fact then holds only where the mount shows nothing but the volume.
    """

    entries: tuple[Entry, ...]
    volumes_are_mounts: bool = False
    _contents: dict[tuple[int, int], _Content] = field(factory=dict, repr=False)

    def in_sandbox(self) -> "Declared":
        """Return the same facts for a sandbox."""
        return evolve(self, volumes_are_mounts=True)

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        """Return what was declared for one file; see ``FactsSource``."""
        entry = None if place is None else self._entry_of(place, st)
        if entry is None:
            return NO_FACTS
        if entry.facts.fsverity_digest is not None and not self._still_intact(
            entry, st, open_file, tells_changes(place)
        ):
            return evolve(entry.facts, fsverity_digest=None, fsverity_signature=False)
        return entry.facts

    def _entry_of(self, place: Place, st: os.stat_result) -> Entry | None:
        for entry in self.entries:  # longest path first
            if entry.place.device != place.device or not _is_at_or_below(entry, place.path):
                continue
            if not entry.is_directory and st.st_ino != entry.ino:
                return None  # something else has the name now: it has no facts, not those of a shorter path either
            if self.volumes_are_mounts and is_volume(entry) and not _is_at_or_below(entry, place.mount_root):
                return None
            return entry
        return None

    def _still_intact(self, entry: Entry, st: os.stat_result, open_file: OpenFile, times_tell: bool) -> bool:
        known = self._contents.get((st.st_dev, st.st_ino))
        if known is None:
            return False
        if known.signature != _signature(st) or not times_tell:
            known.intact = known.intact and _measures_as(entry.facts.fsverity_digest, open_file)
            known.signature = _signature(st)
        return known.intact


def is_volume(entry: Entry) -> bool:
    """Whether an entry is a directory at which a dm-verity volume is declared to be mounted."""
    return entry.facts.dmverity_roothash is not None


def _is_at_or_below(entry: Entry, path: bytes) -> bool:
    if path == entry.place.path:
        return True
    return entry.is_directory and path.startswith(entry.place.path.rstrip(b"/") + b"/")


def _measures_as(expected: Digest | None, open_file: OpenFile) -> bool:
    if expected is None:
        return False
    try:
        fd = open_file()
    except OSError:
        return False
    try:
        return fsverity.measure(fd, expected.algorithm) == expected
    except OSError:
        return False
    finally:
        os.close(fd)


def load(
    locate: Locate,
    files: Iterable[Path] = (),
    boot_verified: Iterable[Path] = (),
    volumes: Iterable[tuple[bytes, Facts]] = (),
) -> Declared:
    """Read the facts that ``--integrity`` files and ``--boot-verified`` paths declare, and check them.

    ``volumes`` are directories and what holds for all that is below each, as if it stood in such a file.

    UserError for a file that is no such table, for a path that does not exist or is declared twice, and for an
    fs-verity digest that the file's content does not have.
    """
    entries: dict[bytes, Entry] = {}
    contents: dict[tuple[int, int], _Content] = {}
    for file in files:
        for number, table in enumerate(_tables(file), 1):
            entry = _entry(locate, table, f"{file}: [[file]] number {number}")
            _add(entries, entry, str(file))
            if entry.facts.fsverity_digest is not None:
                content, identity = _sealed_content(entry, str(file))
                contents[identity] = content
    for path in boot_verified:
        entry = _attach_to_path(locate, os.fsencode(path), Facts(boot_verified=True), "--boot-verified")
        _add(entries, entry, "command line")
    for directory, facts in volumes:
        _add(entries, _attach_to_path(locate, directory, facts, "the volume"), "command line")
    longest_first = sorted(entries.values(), key=lambda entry: len(entry.place.path), reverse=True)
    return Declared(tuple(longest_first), contents=contents)


def _add(entries: dict[bytes, Entry], entry: Entry, where: str) -> None:
    if entry.path in entries:
        raise UserError(f"{where}: {_shown(entry.path)} is declared twice; say all of it in one entry")
    entries[entry.path] = entry


def _tables(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_SIZE:
        raise UserError(f"{file}: larger than {MAX_FILE_SIZE} bytes")
    try:
        document = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not TOML: {error or 'nested too deeply'}") from None
    _only(document, {"file"}, str(file))
    tables = document.get("file", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{file}: facts stand in tables named [[file]], with two brackets")
    return tables


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")


def _entry(locate: Locate, table: Mapping[str, Any], where: str) -> Entry:
    _only(table, {"path", "boot_verified", "dmverity", "fsverity"}, where)
    path = table.get("path")
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise UserError(f"{where}: path must be an absolute path, not {path!r}")
    facts = Facts(boot_verified=_boolean(table, "boot_verified", where))
    if "dmverity" in table:
        digest, signed = _measurement(table["dmverity"], "roothash", f"{where}: dmverity")
        facts = evolve(facts, dmverity_roothash=digest, dmverity_signature=signed)
    if "fsverity" in table:
        digest, signed = _measurement(table["fsverity"], "digest", f"{where}: fsverity")
        facts = evolve(facts, fsverity_digest=digest, fsverity_signature=signed)
    return _attach_to_path(locate, path.encode(), facts, where)


def _boolean(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, not {value!r}")
    return value


def _measurement(table: object, key: str, where: str) -> tuple[Digest, bool]:
    if not isinstance(table, dict):
        raise UserError(f'{where} must be a table such as {{ {key} = "sha256:…", signed = true }}')
    _only(table, {key, "signed"}, where)
    text = table.get(key)
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise UserError(f'{where}: {key} must be "ALGORITHM:HEX", not {text!r}')
    algorithm, _, value = text.partition(":")
    return Digest(algorithm, bytes.fromhex(value)), _boolean(table, "signed", where)


def _attach_to_path(locate: Locate, path: bytes, facts: Facts, where: str) -> Entry:
    try:
        real = os.path.realpath(path, strict=True)
        st = os.stat(real)  # noqa: PTH116 - bytes paths: names need not be UTF-8
        place = locate(real)
    except OSError as error:
        raise UserError(f"{where}: {_shown(path)}: {error.strerror}") from None
    is_directory = stat.S_ISDIR(st.st_mode)
    if not is_directory and not stat.S_ISREG(st.st_mode):
        raise UserError(f"{where}: {_shown(path)} is neither a regular file nor a directory")
    if is_directory and facts.fsverity_digest is not None:
        raise UserError(f"{where}: {_shown(path)} is a directory; fs-verity seals single files")
    if not is_directory and facts.dmverity_roothash is not None:
        raise UserError(f"{where}: {_shown(path)} is a file; dm-verity belongs to the directory a volume is mounted at")
    return Entry(real, facts, is_directory, place, st.st_ino)


def _sealed_content(entry: Entry, where: str) -> tuple[_Content, tuple[int, int]]:
    """Check a declared fs-verity digest against the content; return the state it was measured in, and whose it is."""
    expected = entry.facts.fsverity_digest
    assert expected is not None  # noqa: S101 - the caller asked
    try:
        fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"{where}: {_shown(entry.path)}: cannot be read: {error.strerror}") from None
    try:
        before = os.fstat(fd)
        found = fsverity.measure(fd, expected.algorithm)
    except KernelError as error:
        raise UserError(f"{where}: {_shown(entry.path)}: {error.reason}") from None
    finally:
        os.close(fd)
    if found != expected:
        raise UserError(
            f"{where}: {_shown(entry.path)}: its fs-verity digest is {found}, declared is {expected} "
            f"(blocks of {fsverity.DEFAULT_BLOCK_SIZE} bytes, no salt)"
        )
    return _Content(_signature(before), intact=True), (before.st_dev, before.st_ino)


def _shown(path: bytes) -> str:
    return repr(os.fsdecode(path))[1:-1]
