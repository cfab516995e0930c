"""Who is on the other side of a request: the opener of a node, and the process that waits for its write.

FUSE tells the thread that opens. It tells nothing of who writes, and cuts a write(2) that is longer than one message;
both are found out from the thread that waits for the answer, whose system call /proc shows.
"""

import os
from collections.abc import Iterable
from typing import Final

from attrs import field, frozen

from ipe_emu.audit import UNSET_ID
from ipe_emu.errors import NotJudgedError
from ipe_emu.event import File, Subject
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import capabilities, mountinfo, procfs, statx, syscalls
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.mountinfo import Superblocks
from ipe_emu.lsm import Login, Opener

_MAC_ADMIN_BIT: Final = 1 << Capability.MAC_ADMIN
#: The calls whose data comes from the caller's memory, and where their arguments say so.
_FROM_BUFFER: Final = frozenset({"write", "pwrite64"})
_FROM_VECTOR: Final = frozenset({"writev", "pwritev", "pwritev2"})
#: The calls that take their data from another file: which argument is the descriptor that is written to.
_FROM_FILE: Final = {"sendfile": 0, "splice": 2, "copy_file_range": 2}
_PLAIN_WRITES: Final = frozenset(b"%d" % syscalls.NUMBERS[name] for name in _FROM_BUFFER if name in syscalls.NUMBERS)
#: The calls that read at the descriptor's position, and those that name an offset (preadv2: -1 is the position).
_AT_POSITION: Final = frozenset({"read", "readv"})
_AT_OFFSET: Final = frozenset({"pread64", "preadv", "preadv2"})
_NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF
#: The flag that do_loop_readv_writev() takes no notice of; every other one it refuses.
_RWF_HIPRI: Final = 1
#: The most segments that a vector can have (UIO_MAXIOV).
_UIO_MAXIOV: Final = 1024


@frozen
class Credentials:
    """Whose capabilities count.

    ``user_namespaces`` are the rehearsed machine's own (inode numbers of /proc/PID/ns/user): a capability in any other
    one, such as that of root in a nested namespace, is none. ``assume_for_uid`` is the user who is given CAP_MAC_ADMIN
    on his own mount without having it, or None. ``root`` is what the machine's uid 0 is outside of it.
    """

    user_namespaces: frozenset[int]
    assume_for_uid: int | None = None
    root: int = 0
    _links: frozenset[str] = field(init=False)

    @_links.default
    def _links_of_namespaces(self) -> frozenset[str]:
        return frozenset(procfs.namespace_link("user", number) for number in self.user_namespaces)

    def opener(self, tid: int) -> Opener:
        """Sample the credentials that ``file_ns_capable()`` will look at. What cannot be read is no capability."""
        return _MAC_ADMIN if tid > 0 and self._has_mac_admin(tid) else WITHOUT_CAPABILITY

    def login(self, tid: int) -> Login:
        """What audit records name of a thread, as the machine numbers users; unset where it cannot be read."""
        try:
            auid, ses = procfs.login_ids(tid)
        except (OSError, ValueError):
            return Login()
        return Login(auid - self.root if self.root <= auid != UNSET_ID else UNSET_ID, ses)

    def _has_mac_admin(self, tid: int) -> bool:
        try:
            if procfs.read_namespace_link(tid, "user") not in self._links:
                return False
            if capabilities.effective(tid) & _MAC_ADMIN_BIT:
                return True
            return self.assume_for_uid is not None and procfs.credentials(tid).fsuid == self.assume_for_uid
        except (OSError, ValueError):
            return False


#: What any opener is, for all that the model asks of it. A thread with the number 0 is outside this pid namespace.
WITHOUT_CAPABILITY: Final = Opener(cap_mac_admin=False)
_MAC_ADMIN: Final = Opener(cap_mac_admin=True)


@frozen
class Segment:
    """A piece of the writer's memory."""

    address: int
    length: int


@frozen
class WaitingWrite:
    """The system call of a thread that waits for its write to be answered.

    ``segments`` is empty for sendfile(2) and its kin, whose data is not in the thread's memory.
    """

    tid: int
    call: procfs.SystemCall
    fd: int
    segments: tuple[Segment, ...]

    def is_on(self, device: int | None) -> bool | None:
        """Whether it writes to a file of the mount with this st_dev; None if that cannot be told."""
        found = procfs.descriptor_device(self.tid, self.fd)
        return None if found is None or device is None else found == device

    @property
    def from_file(self) -> bool:
        """Whether the data comes from another file, which securityfs refuses (it has no ``splice_write``)."""
        return self.call.name in _FROM_FILE

    @property
    def has_flags(self) -> bool:
        """Whether it asks for what securityfs cannot do, having no ``write_iter`` (``do_loop_readv_writev()``)."""
        return self.call.name == "pwritev2" and bool(self.call.arguments[5] & 0xFFFFFFFF & ~_RWF_HIPRI)

    @property
    def moves_position(self) -> bool:
        """Whether it moves the position of a descriptor of FUSE."""
        if self.call.name == "pwritev2":
            return self.call.arguments[3] == _NO_OFFSET
        return self.call.name in ("write", "writev")

    @property
    def count(self) -> int:
        """How many bytes the whole call is to write."""
        return sum(segment.length for segment in self.segments)

    def starts_with(self, data: bytes) -> bool:
        """Whether the memory that the call writes begins with ``data``."""
        return self.read(len(data)) == data

    def goes_on_after(self, length: int) -> bool:
        """Whether a byte of the writer's memory follows the first ``length`` ones: more of the call will come."""
        for segment in self.segments:
            if length < segment.length:
                try:
                    return bool(procfs.copy_from_user(self.tid, segment.address + length, 1))
                except OSError:
                    return False
            length -= segment.length
        return False

    def read(self, length: int) -> bytes:
        """Return the first ``length`` bytes that the call writes; OSError where they cannot be read."""
        pieces = []
        for segment in self.segments:
            if length <= 0:
                break
            pieces.append(procfs.read_memory(self.tid, segment.address, min(segment.length, length)))
            length -= segment.length
        return b"".join(pieces)


def waits_in_plain_write(tid: int, ino: int, length: int, read: procfs.ReadRecord) -> bool:
    """Whether a thread waits in a write of exactly so many bytes from its memory; the quick case of ``find_write``."""
    try:
        fd = procfs.waits_in(tid, _PLAIN_WRITES, length, read)
        return fd is not None and procfs.descriptor_inode(tid, fd, read) == ino
    except OSError:
        return False


class Running(Exception):  # noqa: N818 - no error, but the reason to look again
    """A thread is not waiting at the moment, so its system call cannot be seen."""


def waiting_write(tid: int, ino: int) -> WaitingWrite | None:
    """Return what ``tid`` writes to the inode ``ino``, or None if it waits for something else.

    Raises Running while it does not wait, and OSError where it cannot be looked at.
    """
    call = procfs.current_syscall(tid)
    if call is None:
        raise Running
    name = call.name
    arguments = call.arguments
    if name is None:
        return None
    if name in _FROM_BUFFER:
        segments: tuple[Segment, ...] = (Segment(arguments[1], arguments[2]),)
        fd = arguments[0]
    elif name in _FROM_VECTOR:
        segments = _vector(tid, arguments[1], arguments[2])
        fd = arguments[0]
    elif name in _FROM_FILE:
        segments = ()
        fd = arguments[_FROM_FILE[name]]
    else:
        return None
    fd &= 0xFFFFFFFF
    # One that was stopped has its answer, or has not called yet: it is not what waits for one.
    if procfs.descriptor_inode(tid, fd) != ino or procfs.is_stopped(tid):
        return None
    return WaitingWrite(tid, call, fd, segments)


def _vector(tid: int, address: int, count: int) -> tuple[Segment, ...]:
    if not 0 < count <= _UIO_MAXIOV:
        return ()
    words = memoryview(procfs.read_memory(tid, address, 16 * count)).cast("Q")
    return tuple(Segment(words[i], words[i + 1]) for i in range(0, len(words), 2))


def reads_at_position(tid: int, ino: int) -> bool | None:
    """Whether a thread waits in a read at the position of a descriptor of this inode, and not at an offset of its own.

    None if it waits in no read of it. Raises Running while it does not wait, OSError where it cannot be looked at.
    """
    call = procfs.current_syscall(tid)
    if call is None:
        raise Running
    if call.name not in _AT_POSITION | _AT_OFFSET:
        return None
    if procfs.descriptor_inode(tid, call.arguments[0] & 0xFFFFFFFF) != ino:
        return None
    return call.name in _AT_POSITION or (call.name == "preadv2" and call.arguments[3] == _NO_OFFSET)


@frozen
class Target:
    """The node that is written to: its inode number, and the st_dev of its mount where that is known."""

    ino: int
    device: int | None


def find_write(tids: Iterable[int], target: Target, data: bytes, *, compare: bool) -> tuple[WaitingWrite | None, bool]:
    """Look among threads for the one that writes ``data``.

    With ``compare``, and where it cannot be told which mount it writes to, its memory must hold the data. Two threads
    that write the same data to the same node are equally good: each of them does write it. The second value tells
    whether some thread was running, and so not seen.
    """
    running = False
    for tid in tids:
        try:
            found = waiting_write(tid, target.ino)
            if found is None or (on_mount := found.is_on(target.device)) is False:
                continue
            if found.from_file:
                return found, running
            if found.count >= len(data) and ((on_mount and not compare) or found.starts_with(data)):
                return found, running
        except Running:
            running = True
        except (OSError, ValueError):
            continue
    return None, running


def same_call(write: WaitingWrite) -> bool:
    """Whether the thread still waits in the very same system call."""
    try:
        return procfs.current_syscall(write.tid) == write.call
    except OSError:
        return False


def subject_of(tid: int, level: int) -> Subject:
    """Return the process and the name that audit records give.

    ``level`` says which pid namespace numbers the process: 0 is this process's own, 1 one directly below it.
    OSError or LookupError if it cannot be read, or if the process is not in such a namespace.
    """
    return Subject(procfs.process_ids(tid)[level], procfs.comm(tid))


def below_root_of(pid: int, path: bytes) -> bytes:
    """Return ``path`` as a process sees it that may have another root directory (``d_path()``)."""
    root = os.readlink(b"/proc/%d/root" % pid)  # noqa: PTH115 - bytes: a path need not be UTF-8
    return path.removeprefix(root) if root != b"/" and path.startswith(root + b"/") else path


def describe(pid: int, fd: int, facts: FactsSource, superblocks: Superblocks = mountinfo.OF_THIS_MACHINE) -> File:
    """Return the open file ``fd`` of this process as an event of process ``pid`` knows it; OSError on failure."""
    path = os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - bytes: a path need not be UTF-8
    status = os.fstat(fd)
    mount = statx.mount_id(fd)
    known = facts.facts_of(
        superblocks.location(pid, mount, path),
        status,
        lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK),
    )
    superblock = superblocks.name_of(pid, mount, status.st_dev) or "?"
    return File(below_root_of(pid, path), superblock, status.st_ino, known)


def executable_of(pid: int, facts: FactsSource, superblocks: Superblocks) -> File | None:
    """Return the program a process runs (``mm->exe_file``), or None where it cannot be established."""
    try:
        fd = os.open(f"/proc/{pid}/exe", os.O_PATH | os.O_CLOEXEC)
        try:
            return describe(pid, fd, facts, superblocks)
        finally:
            os.close(fd)
    except (OSError, NotJudgedError):
        return None
