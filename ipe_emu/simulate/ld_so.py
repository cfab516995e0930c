"""Which libraries the dynamic linker maps for a program, and in which order (ld.so(8)).

Sources are glibc's elf/dl-load.c and musl's ldso/dynlink.c. The environment is taken to be empty of LD_LIBRARY_PATH and
LD_PRELOAD. What is in /etc/ld.so.preload glibc tries and does without, so it decides nothing. Symbols and their
versions are not looked at.
"""

import functools
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from attrs import define, frozen

from ipe_emu.binfmt import elf
from ipe_emu.binfmt.dynamic import Dynamic, read_dynamic
from ipe_emu.errors import NotJudgedError
from ipe_emu.event import File
from ipe_emu.simulate import ld_cache
from ipe_emu.simulate.tree import Tree, reopen

_HEAD_SIZE: Final = 1024
_GLIBC: Final = re.compile(rb"ld-linux.*\.so\.\d+|ld64\.so\.\d+|ld-\d[\d.]*\.so")
_MUSL: Final = re.compile(rb"ld-musl-(\w+)\.so\.1")
_MUSL_DEFAULT: Final = (b"/lib", b"/usr/local/lib", b"/usr/lib")
# What musl's dynamic linker is itself, up to the dot (ldso/dynlink.c: reserved names in load_library()).
_MUSL_OWN: Final = frozenset({b"libc", b"libpthread", b"librt", b"libm", b"libdl", b"libutil", b"libxnet"})
# In the dynamic linker's own file: the directories it was built to search, and the name of its cache.
_SYSTEM_DIRECTORIES: Final = re.compile(rb"(?:/[!-~]*/\0){2,}")
_CACHE_NAME: Final = re.compile(rb"(/[!-~]*/ld\.so\.cache)\0")
_MAX_LINKER: Final = 8 << 20
# Directories for better CPUs within one that is searched: those of glibc 2.33 and newer, and those of older ones.
_HWCAPS: Final = b"glibc-hwcaps"
_OLD_HWCAPS: Final = (b"tls", b"haswell", b"xeon_phi", b"avx512_1", b"x86_64")
_ORIGIN: Final = re.compile(rb"\$(?:ORIGIN\b|\{ORIGIN\})")
_MAX_CONFIG: Final = 1 << 16
_MOST_CONFIGS: Final = 256
#: More libraries than any program needs; a tree that names more is out to exhaust us.
_MAX_LIBRARIES: Final = 1024
_KEPT: Final = 1024


@frozen
class Library:
    """A file that would be mapped: what is asked of it, and what it needs itself. ``path`` is free of links."""

    path: bytes
    file: File
    executable_segments: int
    dynamic: Dynamic
    #: The directory that $ORIGIN stands for: of the name it was found by.
    origin: bytes


@frozen
class Unusable:
    """A file that a dynamic linker finds and cannot load: it ends the program."""

    path: bytes
    reason: str


class NotFoundHereError(Exception):
    """No directory has a library of that name; ``hint`` says where one is that is not looked at, if one is."""

    def __init__(self, name: bytes, needed_by: bytes, hint: str = "") -> None:
        super().__init__(name, needed_by)
        self.name = name
        self.needed_by = needed_by
        self.hint = hint


class UnusableError(Exception):
    """What was found cannot be loaded."""

    def __init__(self, found: Unusable, needed_by: bytes) -> None:
        super().__init__(found, needed_by)
        self.found = found
        self.needed_by = needed_by


@frozen
class Program:
    """What a dynamic linker is started for; ``path`` is free of links.

    ``secure`` is whether it gains privileges by being executed (AT_SECURE), ``several_names`` whether the file has more
    names than ``path``.
    """

    path: bytes
    dynamic: Dynamic
    secure: bool = False
    several_names: bool = False


@define(eq=False)
class _Object:
    """Something that is mapped, and what made it so (``l_loader``)."""

    path: bytes
    dynamic: Dynamic
    origin: bytes
    loader: "_Object | None" = None

    def chain(self) -> "Iterator[_Object]":
        found: _Object | None = self
        while found is not None:
            yield found
            found = found.loader


#: What is known of a file of the tree, by an O_PATH descriptor.
FileOf = Callable[[int], File]


class Libraries:
    """The libraries of one tree, each read once."""

    def __init__(self, tree: Tree, file_of: FileOf) -> None:
        self._tree = tree
        self._file_of = file_of
        self._kept: OrderedDict[bytes, Library | Unusable | None] = OrderedDict()
        self._linkers: dict[bytes, _Linker | NotJudgedError] = {}

    def of_program(self, program: Program, interpreter: bytes, linker: bytes) -> Iterator[Library]:
        """Yield what the dynamic linker maps for a program, in order.

        ``interpreter`` is the name the program has for its dynamic linker, and ``linker`` where that lies. Raises
        NotFoundHereError or UnusableError where the linker gives up, NotJudgedError where it cannot be said.
        """
        if program.dynamic.needed:
            yield from self._linker(interpreter, linker).libraries(program)

    def _linker(self, interpreter: bytes, linker: bytes) -> "_Linker":
        if linker not in self._linkers:
            try:
                self._linkers[linker] = self._make_linker(interpreter, linker)
            except NotJudgedError as error:
                self._linkers[linker] = error
        found = self._linkers[linker]
        if isinstance(found, NotJudgedError):
            raise NotJudgedError(str(found))
        return found

    def _make_linker(self, interpreter: bytes, linker: bytes) -> "_Linker":
        name = interpreter.rpartition(b"/")[2]
        musl = _MUSL.fullmatch(name)
        if musl:
            return _Linker(self, _MuslSearch(self, interpreter, musl[1]), frozenset({name, interpreter}))
        if _GLIBC.fullmatch(name):
            itself = self.at(linker)
            soname = itself.dynamic.soname if isinstance(itself, Library) else None
            own = frozenset({interpreter, soname or name})
            return _Linker(self, _GlibcSearch(self, linker), own)
        raise NotJudgedError(f"where the dynamic linker {os.fsdecode(interpreter)} looks for libraries is not known")

    def read(self, path: bytes, limit: int) -> bytes | None:
        """Return what a file of the tree holds; see `Tree.read`."""
        return self._tree.read(path, limit)

    def names(self, path: bytes) -> list[bytes]:
        """Return the names in a directory of the tree; see `Tree.names`."""
        return self._tree.names(path)

    def at(self, path: bytes) -> Library | Unusable | None:
        """Return what a dynamic linker finds under an absolute path; None if nothing that it would take."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        found = self._read(path)
        self._kept[path] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _read(self, path: bytes) -> Library | Unusable | None:
        try:
            found = self._tree.look_up(path)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                return Unusable(path, "it is no regular file")
            fd = reopen(found)
            try:
                return self._library(path, found, fd)
            finally:
                os.close(fd)
        finally:
            os.close(found)

    def _library(self, path: bytes, found: int, fd: int) -> Library | Unusable | None:
        head = os.pread(fd, _HEAD_SIZE, 0)
        if len(head) < elf.HEADER_SIZE:
            return Unusable(path, "file too short")
        if not head.startswith(b"\x7fELF"):
            return Unusable(path, "invalid ELF header")
        if elf.kind_of(head) is not elf.Kind.NATIVE:
            return None  # of another machine, or for 32-bit programs: the search goes on
        try:
            segments = elf.read_interpreter(fd, head)
            dynamic = read_dynamic(fd, head)
        except elf.BadElfError as error:
            raise NotJudgedError(f"the library {os.fsdecode(path)}: {error}") from None
        canonical = self._tree.path_of(found)
        return Library(canonical, self._file_of(found), segments.executable_segments, dynamic, _directory(path))


def _directory(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


class _Search(Protocol):
    """Where a dynamic linker looks for a name without a slash."""

    def find(self, name: bytes, needed_by: _Object) -> list[Library | Unusable]:
        """Return what it takes: one file, or several if that depends on the CPU. NotFoundHereError if none."""

    def is_own(self, name: bytes) -> bool:
        """Whether the name stands for the dynamic linker itself."""


@define(eq=False)
class _Linker:
    """A dynamic linker: it maps what is needed breadth first, each name once."""

    _all: Libraries
    _search: _Search
    _own_names: frozenset[bytes]

    def libraries(self, program: Program) -> Iterator[Library]:
        _check_origin(program)
        loaded = set(self._own_names)
        waiting = [_Object(program.path, program.dynamic, _directory(program.path))]
        for needing in waiting:  # grows meanwhile
            _check(needing, secure=program.secure)
            for name in needing.dynamic.needed:
                if name in loaded or self._search.is_own(name):
                    continue
                loaded.add(name)
                for found in self._found(name, needing):
                    if isinstance(found, Unusable):
                        raise UnusableError(found, needing.path)
                    yield found
                    loaded.add(found.dynamic.soname or name)
                    waiting.append(_Object(found.path, found.dynamic, found.origin, needing))
                if len(waiting) > _MAX_LIBRARIES:
                    raise NotJudgedError(f"it needs more than {_MAX_LIBRARIES} libraries")

    def _found(self, name: bytes, needing: _Object) -> Sequence[Library | Unusable]:
        if b"/" not in name:
            return self._search.find(name, needing)
        found = self._all.at(_expanded(name, needing))
        if found is None:
            raise NotFoundHereError(name, needing.path)
        return (found,)


def _check(needing: _Object, *, secure: bool) -> None:
    """Refuse to say what differs between versions of dynamic linkers, or depends on more than the tree."""
    dynamic = needing.dynamic
    shown = os.fsdecode(needing.path)
    if dynamic.rpath is not None and dynamic.runpath is not None:
        raise NotJudgedError(f"{shown} has both DT_RPATH and DT_RUNPATH")
    if dynamic.no_default_directories:
        raise NotJudgedError(f"{shown} is linked with -z nodefaultlib")
    if dynamic.has_filter:
        raise NotJudgedError(f"{shown} is a filter for another library (DT_FILTER)")
    if secure and _uses_origin(dynamic):
        raise NotJudgedError(f"{shown} uses $ORIGIN, in a program that gains privileges")


def _check_origin(program: Program) -> None:
    if program.several_names and _uses_origin(program.dynamic):
        raise NotJudgedError("its libraries are looked for beside it ($ORIGIN), and it has several names")


def _uses_origin(dynamic: Dynamic) -> bool:
    return any(b"$" in text for text in (dynamic.rpath or b"", dynamic.runpath or b"", *dynamic.needed))


def _expanded(text: bytes, needing: _Object) -> bytes:
    """Put in the directory of whoever names a path. NotJudgedError for what is not known of the machine."""
    path = _ORIGIN.sub(lambda _: needing.origin, text)
    if b"$" in path:
        raise NotJudgedError(f"{os.fsdecode(needing.path)} looks for libraries in {os.fsdecode(text)}")
    if not path.startswith(b"/"):
        raise NotJudgedError(
            f"{os.fsdecode(needing.path)} looks for libraries in {os.fsdecode(text)}, which depends on the working"
            " directory"
        )
    return path


class _GlibcSearch:
    """glibc's (``_dl_map_object()``): DT_RPATH of all who lead here, DT_RUNPATH, the cache, built-in directories."""

    def __init__(self, libraries: Libraries, linker: bytes) -> None:
        self._libraries = libraries
        code = libraries.read(linker, _MAX_LINKER) or b""
        directories = set(_SYSTEM_DIRECTORIES.findall(code))
        caches = set(_CACHE_NAME.findall(code))
        if len(directories) != 1 or len(caches) != 1:
            raise NotJudgedError(f"the dynamic linker {os.fsdecode(linker)} does not tell where it looks")
        self._directories = [path.rstrip(b"/") for path in directories.pop().split(b"\0")[:-1]]
        cache = libraries.read(caches.pop(), ld_cache.MAX_SIZE)
        self._cache = ld_cache.read_cache(cache) if cache is not None else {}
        self._configured: list[bytes] | None = None
        self._by_default = functools.lru_cache(_KEPT)(self._find_by_default)
        self._better = functools.lru_cache(_KEPT)(self._better_directories)

    def is_own(self, name: bytes) -> bool:  # noqa: ARG002 - glibc's goes by the names it is loaded under
        return False

    def find(self, name: bytes, needed_by: _Object) -> list[Library | Unusable]:
        paths: list[bytes] = []
        if needed_by.dynamic.runpath is None:
            for loader in needed_by.chain():
                paths += _directories_of(loader.dynamic.rpath, loader)
        paths += _directories_of(needed_by.dynamic.runpath, needed_by)
        for directory in paths:
            if there := self._in_directory(directory, name):
                return there
        found = self._by_default(name)
        if not found:
            raise NotFoundHereError(name, needed_by.path, self._hint(name))
        return found

    def _find_by_default(self, name: bytes) -> list[Library | Unusable]:
        paths = self._cache.get(name, ())
        cached = [found for path in paths if (found := self._libraries.at(path)) is not None]
        if cached and len(cached) < len(paths):
            raise NotJudgedError(f"ld.so.cache lists {os.fsdecode(name)} for several CPUs, and not all are there")
        if cached:
            return cached
        for directory in self._directories:
            if there := self._in_directory(directory, name):
                return there
        return []

    def _in_directory(self, directory: bytes, name: bytes) -> list[Library | Unusable]:
        """Return what is there under a name: for any CPU, and for those that find another one before it."""
        plain = self._libraries.at(directory + b"/" + name)
        better = [
            found for place in self._better(directory) if (found := self._libraries.at(place + b"/" + name)) is not None
        ]
        if better and plain is None:
            raise NotJudgedError(f"{os.fsdecode(directory)} has {os.fsdecode(name)} for some CPUs only")
        return better + ([plain] if plain is not None else [])

    def _better_directories(self, directory: bytes) -> list[bytes]:
        capable = directory + b"/" + _HWCAPS
        found = [capable + b"/" + name for name in sorted(self._libraries.names(capable))]
        old = [directory + b"/" + name for name in _OLD_HWCAPS]
        return found + [place for place in old if self._libraries.names(place)]

    def _hint(self, name: bytes) -> str:
        if self._configured is None:
            self._configured = _configured(self._libraries)
        for directory in self._configured:
            if isinstance(self._libraries.at(directory + b"/" + name), Library):
                where = os.fsdecode(directory)
                return f"it is in {where}, which ld.so.conf names and ld.so.cache does not: run ldconfig -r"
        return ""


def _directories_of(text: bytes | None, owner: _Object) -> list[bytes]:
    return [_expanded(part, owner).rstrip(b"/") for part in text.split(b":")] if text else []


def _configured(libraries: Libraries) -> list[bytes]:
    """Return the directories that /etc/ld.so.conf names for ldconfig(8), those of the files it includes among them."""
    lines = (libraries.read(b"/etc/ld.so.conf", _MAX_CONFIG) or b"").splitlines()
    for name in sorted(libraries.names(b"/etc/ld.so.conf.d"))[:_MOST_CONFIGS]:
        if name.endswith(b".conf"):
            lines += (libraries.read(b"/etc/ld.so.conf.d/" + name, _MAX_CONFIG) or b"").splitlines()
    return [line.strip() for line in lines if line.startswith(b"/")][:_MOST_CONFIGS]


class _MuslSearch:
    """musl's (``load_library()``): the DT_RUNPATH or DT_RPATH of all who lead here, and one list of directories."""

    def __init__(self, libraries: Libraries, interpreter: bytes, architecture: bytes) -> None:
        self._libraries = libraries
        if _directory(interpreter) != b"/lib":
            raise NotJudgedError(f"musl's dynamic linker is {os.fsdecode(interpreter)}, and not in /lib")
        configured = libraries.read(b"/etc/ld-musl-" + architecture + b".path", _MAX_CONFIG)
        self._directories = (
            _MUSL_DEFAULT if configured is None else tuple(filter(None, re.split(rb"[:\n]", configured)))
        )

    def is_own(self, name: bytes) -> bool:
        return name.partition(b".")[0] in _MUSL_OWN

    def find(self, name: bytes, needed_by: _Object) -> list[Library | Unusable]:
        paths: list[bytes] = []
        for loader in needed_by.chain():
            own = loader.dynamic.rpath if loader.dynamic.runpath is None else loader.dynamic.runpath
            paths += _directories_of(own, loader)
        for directory in (*paths, *self._directories):
            if found := self._libraries.at(directory + b"/" + name):
                return [found]
        raise NotFoundHereError(name, needed_by.path)
