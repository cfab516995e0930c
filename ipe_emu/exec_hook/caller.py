"""The thread behind one notification, as its handler sees it: who it is, and the files it names."""

import errno
import os
from types import TracebackType
from typing import Self

from attrs import frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Subject
from ipe_emu.exec_hook.access import EVERYTHING, Access
from ipe_emu.exec_hook.mounts import Mount, Mounts
from ipe_emu.exec_hook.overlays import Overlays, Real
from ipe_emu.exec_hook.resolve import look_up
from ipe_emu.integrity.facts import Facts
from ipe_emu.integrity.sources import OpenFile, Place
from ipe_emu.linux.mountinfo import Location
from ipe_emu.linux.overlayfs import NAME as OVERLAY
from ipe_emu.linux.tracee import Mapping, Tracee

# d_path() appends this to the name of a file without a directory entry.
_DELETED = b" (deleted)"


@frozen
class Machine:
    """Where the rehearsed machine begins.

    ``user_namespace`` is the inode number of the one whose root is root of it. ``pid_depth`` says how many pid
    namespaces lie between ours and the machine's, which to its kernel is the initial one.
    """

    user_namespace: int
    pid_depth: int

    def subject(self, tracee: Tracee) -> Subject:
        """Return a process as the machine's audit records name it: by its pid there, and the calling thread's name."""
        return Subject(tracee.status.ns_tgids[self.pid_depth], tracee.comm())


class Caller:
    """One thread that waits for an answer. Every descriptor opened for it is closed when the ``with`` block ends.

    That must be before the answer: an open descriptor would make the caller's next umount(2) fail with EBUSY.
    """

    def __init__(self, pid: int, mounts: Mounts, overlays: Overlays, machine: Machine) -> None:
        self.tracee = Tracee(pid)
        self._mounts = mounts
        self._overlays = overlays
        self._machine = machine
        self._opened: list[int] = []
        self._stats: dict[int, os.stat_result] = {}
        # Each is read once, when it is asked for.
        self._subject: Subject | None = None
        self._access: Access | None = None
        self._root: bytes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for fd in self._opened:
            os.close(fd)

    # -- who ----------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> Subject:
        """The process as audit records name it."""
        if self._subject is None:
            self._subject = self._machine.subject(self.tracee)
        return self._subject

    def renamed(self, comm: bytes) -> Subject:
        """Return the same process under the name that execve(2) gives it (``__set_task_comm()``: 15 bytes)."""
        return Subject(self.subject.pid, comm[:15])

    def capable(self, capability: int) -> bool:
        """Whether the caller has a capability over the rehearsed machine: root of a nested user namespace has none."""
        return self.tracee.status.capable(capability) and self.tracee.user_namespace() == self._machine.user_namespace

    # -- its memory ---------------------------------------------------------------------------------------------

    def copy_in(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes of the caller's memory; KernelError EFAULT (``copy_from_user()``)."""
        try:
            data = self.tracee.memory(address, size)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            data = b""
        if len(data) < size:
            raise KernelError(errno.EFAULT, "memory that cannot be read", "copy_from_user")
        return data

    def copy_out(self, address: int, data: bytes) -> None:
        """Write to the caller's memory, which a plan does when it is carried out; KernelError EFAULT."""
        try:
            self.tracee.write_memory(address, data)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise KernelError(errno.EFAULT, "memory that cannot be written", "copy_to_user") from None

    # -- its files ----------------------------------------------------------------------------------------------

    @property
    def access(self) -> Access:
        """What its ids permit it."""
        if self._access is None:
            self._access = Access.of(self.tracee)
        return self._access

    def look_up(self, directory: int, path: bytes, *, follow: bool = True, searching: bool = True) -> int:
        """Return an O_PATH descriptor of what a path names to the caller; see `resolve.look_up`.

        Without ``searching`` it is not looked at whether the caller may search the directories on the way.
        """
        access = self.access if searching else EVERYTHING
        return self._keep(look_up(self.tracee, self._mounts, access, directory, path, follow=follow))

    def descriptor(self, fd: int) -> int | None:
        """Return an O_PATH descriptor of the caller's ``fd``, whatever it is; None if it is not open."""
        try:
            return self._keep(self.tracee.open_fd(fd))
        except FileNotFoundError:
            return None

    def program(self) -> File:
        """Return what IPE knows of the program that the caller runs (``mm->exe_file``)."""
        return self.file(self._keep(self.tracee.open_program()))

    def root(self) -> int:
        """Return an O_PATH descriptor of the caller's root directory."""
        return self._keep(self.tracee.open_root())

    def cwd(self) -> int:
        """Return an O_PATH descriptor of the caller's working directory."""
        return self._keep(self.tracee.open_cwd())

    def mapping(self, mapping: Mapping) -> int:
        """Return an O_PATH descriptor of a mapping's file. PermissionError without authority over the machine."""
        return self._keep(self.tracee.open_mapping(mapping))

    def may_use(self, fd: int) -> bool:
        """Whether fget() takes the caller's open ``fd``: an O_PATH descriptor is none to it."""
        return not self.tracee.flags_of_fd(fd) & os.O_PATH

    def may_read(self, fd: int) -> bool:
        """Whether the caller's open ``fd`` is open for reading (FMODE_READ)."""
        flags = self.tracee.flags_of_fd(fd)
        return not flags & os.O_PATH and flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    def may_write(self, fd: int) -> bool:
        """Whether the caller's open ``fd`` is open for writing (FMODE_WRITE)."""
        flags = self.tracee.flags_of_fd(fd)
        return not flags & os.O_PATH and flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    def readable(self, path_fd: int) -> int:
        """Open one of our O_PATH descriptors of a regular file for reading. NotJudgedError where we may not."""
        try:
            return self._keep(os.open(b"/proc/self/fd/%d" % path_fd, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except PermissionError as error:
            raise NotJudgedError(f"{_shown(path_of(path_fd))} cannot be read: {error.strerror}") from None

    def place(self, fd: int) -> Place | None:
        """Return where the file of one of our descriptors lies on its file system; None if nobody sees its mount."""
        return self.locate(fd)[1]

    def file(self, fd: int) -> File:
        """Return what IPE knows of the file behind one of our descriptors (``build_ipe_eval_ctx()``)."""
        path, mount, facts = self._known(fd)
        return File(self.below_root(path), mount.superblock, self.stat(fd).st_ino, facts)

    def facts(self, fd: int) -> Facts:
        """Return the facts of that alone."""
        return self._known(fd)[2]

    def stat(self, fd: int) -> os.stat_result:
        """Return the status of one of our descriptors, as it was when it was asked for first."""
        found = self._stats.get(fd)
        if found is None:
            found = self._stats[fd] = os.fstat(fd)
        return found

    def _known(self, fd: int) -> tuple[bytes, Mount, Facts]:
        path = path_of(fd)
        st = self.stat(fd)
        mount, location = self._locate(fd, path, st)
        return path, mount, self._overlays.facts_of(location, st, _opening(fd))

    def locate(self, fd: int) -> tuple[Mount, Location | None]:
        """Return the mount that one of our descriptors lies on, and where on its file system (None: nobody sees it)."""
        return self._locate(fd, path_of(fd), self.stat(fd))

    def real(self, fd: int) -> Real | None:
        """Return the layer's file behind a file on an overlay of the tree's; None if that is no such file."""
        _, location = self.locate(fd)
        return None if location is None else self._overlays.real(location, self.stat(fd))

    def mapped_file(self, fd: int) -> File:
        """Return the same as ``file`` of what is mapped by a file: of an overlay, the layer's (``ovl_mmap()``)."""
        real = self.real(fd)
        if real is None:
            return self.file(fd)
        facts = self._overlays.facts.facts_of(real.location, real.status, real.open_file)
        return File(real.path, real.superblock, real.status.st_ino, facts)

    def _locate(self, fd: int, path: bytes, st: os.stat_result) -> tuple[Mount, Location | None]:
        mount, location = self._mounts.locate(self.tracee.pid, fd, path, st.st_ino)
        if mount.superblock == OVERLAY and location is not None:
            self._overlays.bind(self.tracee.pid, location.device)
        return mount, location

    def below_root(self, path: bytes) -> bytes:
        """Name a path of the mount namespace as d_path() does for the caller, who may have changed its root."""
        if self._root is None:
            self._root = self.tracee.root_path().rstrip(b"/")
        return path[len(self._root) :] if self._root and path.startswith(self._root + b"/") else path

    def _keep(self, fd: int) -> int:
        self._opened.append(fd)
        return fd


def _opening(fd: int) -> OpenFile:
    return lambda: os.open(b"/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def entry_name(fd: int) -> bytes:
    """Return the name of the directory entry that one of our descriptors was opened by (``dentry->d_name``)."""
    path = path_of(fd)
    if os.fstat(fd).st_nlink == 0:
        path = path.removesuffix(_DELETED)
    if path.startswith(b"/memfd:"):  # no directory entry: the name may hold slashes
        return path[1:]
    return path.rpartition(b"/")[2]


def path_of(fd: int) -> bytes:
    """Return where one of our descriptors lies in its mount namespace, or what else d_path() calls it."""
    return os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - bytes: names need not be UTF-8


def _shown(path: bytes) -> str:
    return os.fsdecode(path)
