"""Opening the file whose path was written to a node, as the writer would have opened it (op=POLICY's path form)."""

import errno
import fcntl
import os
import signal
import stat
import struct
import threading
from queue import Empty, Queue
from typing import Final

from attrs import frozen

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import procfs, syscalls
from ipe_emu.linux.mountinfo import Superblocks
from ipe_securityfs.clients import describe

#: More than any policy; kernel_read_file() would go to 2 GiB, which would only tie up memory here.
MAX_FILE_SIZE: Final = 64 << 20
#: How long a file system may take to give the file (a network one could take forever).
_SECONDS: Final = 20.0

_FUNCTION: Final = "kernel_read_file_from_path"
_RESOLVE_IN_ROOT: Final = 0x10
_CAPABILITY_VERSION_3: Final = 0x20080522


@frozen
class PolicyFileReader:
    """Reads files for one writing process, which calls itself ``own_pid`` in its own /proc.

    ``own_device`` is this mount's st_dev, through which nothing is read.
    """

    pid: int
    own_pid: int
    facts: FactsSource
    superblocks: Superblocks
    own_device: int | None

    def __call__(self, path: bytes) -> tuple[File, bytes]:
        """Return the file and its content, or raise KernelError with what open(2) or the read would have answered."""
        path = path.partition(b"\0")[0]  # the kernel's string ends there
        try:
            fd = self._open(path)
            try:
                return self._read(fd, path)
            finally:
                os.close(fd)
        except KernelError:
            raise
        except (OSError, ValueError, NotImplementedError, NotJudgedError) as error:
            number = error.errno if isinstance(error, OSError) else None
            raise KernelError(number or errno.EACCES, f"{os.fsdecode(path)!r}: {error}", _FUNCTION) from None

    def _open(self, path: bytes) -> int:
        """Open the file in a thread of its own, which takes on the writer's ids and capabilities and ends with that.

        So no other thread ever has them, and nothing has to be restored.
        """
        outcome: Queue[int | Exception] = Queue()

        def opening() -> None:
            try:
                outcome.put(_open_as(self.pid, _as_seen_by(self.own_pid, path)))
            except Exception as error:
                outcome.put(error)

        threading.Thread(target=opening, name="policy-file", daemon=True).start()
        try:
            result = outcome.get(timeout=_SECONDS)
        except Empty:
            raise KernelError(
                errno.EACCES, f"{os.fsdecode(path)!r} could not be opened in {_SECONDS:.0f} s", _FUNCTION
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def _read(self, fd: int, path: bytes) -> tuple[File, bytes]:
        status = os.fstat(fd)
        if status.st_dev == self.own_device:
            raise KernelError(errno.EINVAL, "a policy cannot be read from the emulated securityfs itself", _FUNCTION)
        if not stat.S_ISREG(status.st_mode):
            raise KernelError(errno.EINVAL, f"{os.fsdecode(path)!r} is not a regular file", "kernel_read_file")
        _deny_write_access(fd, path)
        if status.st_size <= 0:
            raise KernelError(errno.EINVAL, f"{os.fsdecode(path)!r} is empty", "kernel_read_file")
        if status.st_size > MAX_FILE_SIZE:
            raise KernelError(errno.EFBIG, f"{os.fsdecode(path)!r} is too large for a policy", "kernel_read_file")
        return describe(self.pid, fd, self.facts, self.superblocks), _content(fd, status.st_size)


def _open_as(pid: int, path: bytes) -> int:
    writer = procfs.credentials(pid)
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _become(writer)
        return _open_in_root(root, path)
    finally:
        os.close(root)


def _deny_write_access(fd: int, path: bytes) -> None:
    """Have nobody write the file until ``fd`` is closed, as ``deny_write_access()`` does.

    KernelError ETXTBSY if somebody has it open for writing, EACCES where that cannot be established. A read lease
    (F_SETLEASE in fcntl(2)) is given to nobody while there is a writer, and makes later ones wait for its end.
    """
    try:
        # Asked to give up the lease, this process goes on reading: the default action of SIGURG is none.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise KernelError(
                errno.ETXTBSY, f"{os.fsdecode(path)!r} is open for writing", "deny_write_access"
            ) from None
        raise KernelError(
            errno.EACCES,
            f"whether {os.fsdecode(path)!r} is open for writing cannot be established ({error.strerror}): the file must"
            " be this user's own or this process have CAP_LEASE, and its file system must know leases",
            "deny_write_access",
        ) from None


def _content(fd: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    if size:
        raise KernelError(errno.EIO, "the file became shorter while it was read", "kernel_read_file")
    return b"".join(pieces)


def _as_seen_by(pid: int, path: bytes) -> bytes:
    """Name the writer where the path says ``self``: this process opens it, and has a self of its own."""
    for own in (b"/proc/self", b"/proc/thread-self"):
        if path == own or path.startswith(own + b"/"):
            return b"/proc/%d" % pid + path[len(own) :]
    return path


def _open_in_root(root: int, path: bytes) -> int:
    # O_NONBLOCK: the open of a fifo without a writer must not wait; a regular file takes no notice of it.
    how = struct.pack("=QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0, _RESOLVE_IN_ROOT)
    return syscalls.call("openat2", root, path, _buffer(how), len(how))


def _buffer(data: bytes) -> syscalls.Argument:
    buffer = syscalls.writable(len(data))
    buffer.raw = data
    return buffer


def _become(writer: procfs.Credentials) -> None:
    """Give this thread, and it alone, the ids and effective capabilities of the writer; OSError if it cannot have them.

    The system calls are made directly: the functions of libc change every thread.
    """
    own = procfs.credentials(syscalls.call("gettid"))
    ids = (writer.fsuid, writer.fsgid, writer.groups)
    if ids != (own.fsuid, own.fsgid, own.groups):
        groups = struct.pack(f"={len(writer.groups)}I", *writer.groups)
        syscalls.call("setgroups", len(writer.groups), _buffer(groups) if groups else None)
        syscalls.call("setresgid", -1, writer.fsgid, -1)
        syscalls.call("setresuid", -1, writer.fsuid, -1)
        own = procfs.credentials(syscalls.call("gettid"))
    wanted = own.cap_effective & writer.cap_effective
    if wanted != own.cap_effective:
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        syscalls.call("capset", _buffer(header), _buffer(_capability_sets(wanted)))


def _capability_sets(effective: int) -> bytes:
    """Pack effective and permitted sets, with nothing to inherit (capset(2), two 32-bit words for each set)."""
    low, high = effective & 0xFFFFFFFF, effective >> 32
    return struct.pack("=6I", low, low, 0, high, high, 0)
