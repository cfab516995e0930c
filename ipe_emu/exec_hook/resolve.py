"""Path lookup as a caller's own: from its root and working directory, with its idea of /proc/self."""

import errno
import os
import stat
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.access import Access
from ipe_emu.exec_hook.mounts import Mounts
from ipe_emu.linux import openat2
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.linux.tracee import Tracee, start_time

# MAXSYMLINKS in the kernel
_MAX_LINKS: Final = 40
_PATH_ONLY: Final = os.O_PATH | os.O_CLOEXEC
_NO_FOLLOW: Final = _PATH_ONLY | os.O_NOFOLLOW

# What a lookup itself answers; any other errno says that we could not look.
_LOOKUP_ERRORS: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO}
)

_OWN_PROGRAM: Final = b"/proc/self/exe"
# PROC_ROOT_INO in the kernel
_PROC_ROOT_INODE: Final = 1


def look_up(tracee: Tracee, mounts: Mounts, access: Access, directory: int, path: bytes, *, follow: bool = True) -> int:
    """Return an O_PATH descriptor of what ``path`` names to the caller, seen from its descriptor ``directory``.

    ``follow`` says whether a symbolic link at the end is followed. Raises KernelError with the errno of the lookup
    (``path_openat()``), OSError or NotJudgedError if we cannot look.
    """
    if not path:
        raise KernelError(errno.ENOENT, "the path is empty", "getname_flags")
    start = _start(tracee, directory, path)
    try:
        if path == _OWN_PROGRAM and access.override:
            found = _own_program(tracee, mounts, start)
            if found is not None:
                return found
        if follow and access.override:
            # Whoever meets no /proc/self on the way gets the same answer as the caller; magic links end this attempt.
            # A relative path could leave the caller's root unseen, so it must neither climb nor meet a link.
            absolute = openat2.RESOLVE_IN_ROOT | openat2.RESOLVE_NO_MAGICLINKS
            relative = openat2.RESOLVE_BENEATH | openat2.RESOLVE_NO_SYMLINKS
            try:
                return openat2.open_path(start, path, absolute if path.startswith(b"/") else relative)
            except OSError:
                pass  # the walk below says why
        walk = _Walk(tracee, mounts, access, start)
        try:
            return walk.to(path, follow=follow)
        except OSError as error:
            if isinstance(error, KernelError) or error.errno not in _LOOKUP_ERRORS:
                raise
            raise KernelError(error.errno, f"{os.fsdecode(path)}: {error.strerror}", "link_path_walk") from None
    finally:
        os.close(start)


def _start(tracee: Tracee, directory: int, path: bytes) -> int:
    if path.startswith(b"/"):
        return tracee.open_root()
    if directory == AT_FDCWD:
        return tracee.open_cwd()
    try:
        return tracee.open_fd(directory)
    except FileNotFoundError:
        raise KernelError(errno.EBADF, f"descriptor {directory} is not open", "path_init") from None


def _own_program(tracee: Tracee, mounts: Mounts, root: int) -> int | None:
    """Return what /proc/self/exe leads to, without a walk: busybox executes its applets so. None if a walk must see."""
    try:
        proc = os.open(b"proc", _PATH_ONLY | os.O_NOFOLLOW | os.O_DIRECTORY, dir_fd=root)
    except OSError:
        return None
    try:
        if os.fstat(proc).st_ino != _PROC_ROOT_INODE or mounts.of(tracee.pid, proc).superblock != "proc":
            return None
    finally:
        os.close(proc)
    return tracee.open_program()


def _own_directory(tracee: Tracee, proc: int, *, thread: bool) -> bytes:
    """Return the caller's directory in the procfs whose root is ``proc`` (``proc_self_get_link()``)."""
    status = tracee.status
    born = tracee.start_time()
    # That procfs belongs to one of the pid namespaces that the caller is in, most likely to the innermost.
    for level in reversed(range(len(status.ns_tgids))):
        process, own = status.ns_tgids[level], status.ns_pids[level]
        name = b"%d/task/%d" % (process, own)
        try:
            fd = os.open(name + b"/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            continue
        try:
            if start_time(os.read(fd, 4096)) == born:
                return name if thread else b"%d" % process
        finally:
            os.close(fd)
    raise NotJudgedError("/proc/self was asked for in a procfs in which the caller could not be found")


class _Walk:
    """One lookup, component by component, for the paths that a single openat2(2) of ours would answer wrongly."""

    def __init__(self, tracee: Tracee, mounts: Mounts, access: Access, start: int) -> None:
        self._tracee = tracee
        self._mounts = mounts
        self._access = access
        self._links = 0
        self._current = os.dup(start)

    def to(self, path: bytes, *, follow: bool) -> int:
        """Walk; return the descriptor of the end, which the caller closes."""
        pending = _components(path)
        try:
            while pending:
                name = pending.pop()
                found = self._step(name)
                if stat.S_ISLNK(os.fstat(found).st_mode) and (pending or follow):
                    try:
                        pending += self._follow(name, found)
                    finally:
                        os.close(found)
                else:
                    self._go(found)
        except BaseException:
            os.close(self._current)
            raise
        return self._current

    def _go(self, fd: int) -> None:
        os.close(self._current)
        self._current = fd

    def _step(self, name: bytes) -> int:
        st = os.fstat(self._current)
        if stat.S_ISDIR(st.st_mode) and self._access.forbids_execution(st, self._current):
            raise KernelError(errno.EACCES, "a directory on the way may not be searched", "may_lookup")
        if name == b".." and self._at_root(st):
            return os.dup(self._current)
        return os.open(name, _NO_FOLLOW, dir_fd=self._current)

    def _at_root(self, st: os.stat_result) -> bool:
        root = self._tracee.open_root()
        try:
            there = os.fstat(root)
            return (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino) and self._mount(root) == self._mount(
                self._current
            )
        finally:
            os.close(root)

    def _mount(self, fd: int) -> int:
        return self._mounts.of(self._tracee.pid, fd).id

    def _follow(self, name: bytes, link: int) -> list[bytes]:
        """Follow the link ``name``: return what is to be walked next, having moved to where that walk begins."""
        self._links += 1
        if self._links > _MAX_LINKS:
            raise KernelError(errno.ELOOP, "too many symbolic links", "pick_link")
        if self._mounts.of(self._tracee.pid, link).superblock == "proc":
            if name in (b"self", b"thread-self") and os.fstat(self._current).st_ino == _PROC_ROOT_INODE:
                return _components(_own_directory(self._tracee, self._current, thread=name == b"thread-self"))
            if self._is_magic(name):
                self._go(os.open(name, _PATH_ONLY, dir_fd=self._current))
                return []
        target = os.readlink(b"", dir_fd=link)
        if not target:
            raise KernelError(errno.ENOENT, "an empty symbolic link", "pick_link")
        if target.startswith(b"/"):
            self._go(self._tracee.open_root())
        return _components(target)

    def _is_magic(self, name: bytes) -> bool:
        """Whether a link of procfs leads to an object and not to a path (``nd_jump_link()``)."""
        try:
            os.close(openat2.open_path(self._current, name, openat2.RESOLVE_NO_MAGICLINKS))
        except OSError as error:
            return error.errno == errno.ELOOP
        return False


def _components(path: bytes) -> list[bytes]:
    """Split a path into its names, last first. A slash at the end asks for a directory, as the name ``.`` does."""
    names = [name for name in path.split(b"/") if name]
    if path.endswith(b"/"):
        names.append(b".")
    names.reverse()
    return names
