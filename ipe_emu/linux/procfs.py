"""Reading /proc/PID of another process: its credentials, its namespaces, and the system call it waits in.

Every function takes a process or a thread id as this process's own /proc numbers them. OSError says what could not be
read: ENOENT or ESRCH where the task is gone, EACCES or EPERM where this process may not look.
"""

import errno
import os
import signal
import struct
from collections.abc import Callable, Collection, Iterator
from typing import Final

from attrs import frozen

from ipe_emu.linux import statx, syscalls

#: What the kernel's administrator writes to, below /proc.
CONTROLS: Final = ("sys", "sysrq-trigger", "irq", "bus", "fs")
#: Longer than any file of /proc that is read whole here; those of the kernel end well below.
_CHUNK: Final = 1 << 16
#: Longer than nearly every record.
_RECORD: Final = 4096
#: More than a record of syscall, and enough for the inode number in one of fdinfo.
_BEGINNING: Final = 400
#: How many files of one thread are kept open.
_MOST_KEPT: Final = 8
#: Of a task's flags in its stat (include/linux/sched.h).
_PF_EXITING: Final = 0x4


@frozen
class Credentials:
    """The ids and the effective capabilities of a task, from /proc/PID/status (proc_pid_status(5))."""

    tgid: int
    uid: int
    euid: int
    fsuid: int
    gid: int
    egid: int
    fsgid: int
    groups: tuple[int, ...]
    cap_effective: int

    def has(self, capability: int) -> bool:
        """Whether a capability is in the effective set (in the task's own user namespace)."""
        return bool(self.cap_effective >> capability & 1)


@frozen
class SystemCall:
    """The system call in which a task waits: its number and its six arguments, as registers."""

    number: int
    arguments: tuple[int, ...]

    @property
    def name(self) -> str | None:
        """Its name on this machine, or None where the number is in no table here."""
        return syscalls.NAMES.get(self.number)


def read(pid: int | str, name: str) -> bytes:
    """Return the whole content of /proc/PID/``name``, which comes in pieces of as many lines as fit into a page.

    See ``record`` for the files that have but one piece.
    """
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_again(fd)
    finally:
        os.close(fd)


def record(pid: int | str, name: str) -> bytes:
    """Return the whole content of a /proc/PID/``name`` that the kernel makes as one record, however long.

    Such are status, comm, syscall, loginuid, sessionid and fdinfo/N (``single_open()``, ``simple_read_from_buffer()``).
    A read of them that is not filled has come to the end, so that one is enough.
    """
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _RECORD)
        if len(data) == _RECORD:
            while piece := os.read(fd, _CHUNK):
                data += piece
        return data
    finally:
        os.close(fd)


#: Reads one record, as ``record`` does.
ReadRecord = Callable[[int, str], bytes]


class KeptRecords:
    """``record``, for somebody who looks at the same thread again and again: its files stay open, a look is one call.

    An open file of /proc/TID is that thread's for good. When the thread has ended it gives nothing more, whoever has
    its number then. To be used by one thread, which sees no more of a record than its first 400 bytes.
    """

    def __init__(self) -> None:
        self._tid = 0
        self._open: dict[str, int] = {}

    def record(self, tid: int, name: str) -> bytes:
        """Return a record of /proc/TID; see ``ReadRecord``."""
        if tid != self._tid:
            self.close()
            self._tid = tid
        fd = self._open.get(name)
        if fd is not None:
            try:
                return os.pread(fd, _BEGINNING, 0)
            except OSError:  # it has ended, or closed what this is about; or another has its number
                os.close(self._open.pop(name))
        if len(self._open) >= _MOST_KEPT:
            self.close()
        fd = self._open[name] = os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(fd, _BEGINNING, 0)

    def close(self) -> None:
        """Let go of every file."""
        while self._open:
            os.close(self._open.popitem()[1])


def read_again(fd: int) -> bytes:
    """Return the whole content of an open file of /proc, as it is now; in any thread."""
    content = bytearray()
    while data := os.pread(fd, _CHUNK, len(content)):
        content += data
    return bytes(content)


def credentials(pid: int) -> Credentials:
    """Return the credentials of a task."""
    status = record(pid, "status")
    uid, euid, _, fsuid = map(int, _field(status, b"Uid").split())
    gid, egid, _, fsgid = map(int, _field(status, b"Gid").split())
    return Credentials(
        tgid=int(_field(status, b"Tgid")),
        uid=uid,
        euid=euid,
        fsuid=fsuid,
        gid=gid,
        egid=egid,
        fsgid=fsgid,
        groups=tuple(map(int, _field(status, b"Groups").split())),
        cap_effective=int(_field(status, b"CapEff"), 16),
    )


def _field(status: bytes, name: bytes) -> bytes:
    # The name of the task comes first, with its newlines escaped: no other line begins as these do.
    start = status.index(b"\n" + name + b":\t") + len(name) + 3
    return status[start : status.index(b"\n", start)]


def process_ids(pid: int) -> tuple[int, ...]:
    """Return the number of a task's process in this pid namespace, and then in each one further down it is in."""
    status = record(pid, "status")
    try:
        return tuple(map(int, _field(status, b"NStgid").split()))
    except ValueError:  # a kernel without pid namespaces
        return (int(_field(status, b"Tgid")),)


def comm(pid: int) -> bytes:
    """Return the name of a task as audit records give it (``comm``, at most 15 bytes)."""
    return record(pid, "comm").removesuffix(b"\n")


def login_ids(pid: int) -> tuple[int, int]:
    """Return the audit user id and the session id of a task; 4294967295 where it never logged in.

    A kernel without audit has neither file; nobody logs in there.
    """
    try:
        return int(record(pid, "loginuid")), int(record(pid, "sessionid"))
    except FileNotFoundError:
        return 0xFFFFFFFF, 0xFFFFFFFF


def namespace(pid: int | str, kind: str) -> int:
    """Return the inode number of a task's namespace, which identifies it (namespaces(7)); ``kind`` such as ``user``."""
    return int(read_namespace_link(pid, kind)[len(kind) + 2 : -1])


def read_namespace_link(pid: int | str, kind: str) -> str:
    """Return what /proc/PID/ns/KIND says of a task's namespace, which identifies it as well as the number in it."""
    return os.readlink(f"/proc/{pid}/ns/{kind}")  # noqa: PTH115 - several times as fast, and on every open


def namespace_link(kind: str, number: int) -> str:
    """Return what the link of a namespace with an inode number says."""
    return f"{kind}:[{number}]"


def current_syscall(tid: int) -> SystemCall | None:
    """Return the system call in which a thread waits, or None while it runs (``task_current_syscall()``)."""
    words = record(tid, "syscall").split()
    if not words or words[0] in (b"running", b"-1"):
        return None
    return SystemCall(int(words[0]), tuple([int(word, 16) for word in words[1:7]]))


def waits_in(tid: int, numbers: Collection[bytes], third_argument: int, read: ReadRecord = record) -> int | None:
    """Return the first argument of one of these system calls, if a thread waits in it with that third argument.

    Their ``numbers`` are in decimal, as /proc shows them. Quicker than ``current_syscall``.
    """
    words = read(tid, "syscall").split(b" ", 4)
    if len(words) < 5 or words[0] not in numbers or words[3] != b"0x%x" % third_argument:
        return None
    return int(words[1], 16)


def descriptor_inode(tid: int, fd: int, read: ReadRecord = record) -> int | None:
    """Return the inode number behind a descriptor of a task, without asking its file system; None if it is closed."""
    try:
        info = read(tid, f"fdinfo/{fd}")
    except FileNotFoundError:
        return None
    begin = info.find(b"\nino:")
    return None if begin < 0 else int(info[begin + 5 : info.index(b"\n", begin + 5)])


def descriptor_device(tid: int, fd: int) -> int | None:
    """Return the device number (st_dev) of the mount behind a descriptor of a task, without asking its file system.

    None if the task's mount namespace does not have that mount.
    """
    wanted = b"%d" % mount_id(tid, fd)
    for line in read(tid, "mountinfo").splitlines():
        number, _, device = line.split(b" ", 3)[:3]
        if number == wanted:
            major, _, minor = device.partition(b":")
            return os.makedev(int(major), int(minor))
    return None


def mount_id(pid: int, fd: int) -> int:
    """Return the id of the mount that a descriptor of another process lies on; ``statx.mount_id`` tells one's own."""
    for line in record(pid, f"fdinfo/{fd}").splitlines():
        if line.startswith(b"mnt_id:"):
            return int(line[7:])
    raise ValueError(f"/proc/{pid}/fdinfo/{fd} has no mnt_id")


def read_memory(tid: int, address: int, length: int) -> bytes:
    """Return ``length`` bytes of a task's memory; OSError EIO where they are not all mapped."""
    fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while length:
            # addresses of user memory fit into off_t on every machine with a table of system calls here
            piece = os.pread(fd, min(length, 1 << 20), address)
            if not piece:
                raise OSError(5, "the memory ends early")
            pieces.append(piece)
            address += len(piece)
            length -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def copy_from_user(tid: int, address: int, length: int) -> bytes:
    """Return ``length`` bytes as the task itself could read them; OSError EFAULT where it could not read them all.

    ``read_memory`` also gives what is mapped with PROT_NONE, which a system call of the task does not get.
    """
    data = syscalls.writable(length)
    here = struct.pack("=QQ", syscalls.address(data), length)
    there = struct.pack("=QQ", address, length)
    if length and syscalls.call("process_vm_readv", tid, here, 1, there, 1, 0) != length:
        raise OSError(errno.EFAULT, "the memory ends early")
    return data.raw


def threads(pid: int) -> list[int]:
    """Return the thread ids of a process."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - a /proc path is no tree to walk


def processes() -> list[int]:
    """Return the id of every process that this /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - any type


def all_threads() -> Iterator[int]:
    """Yield the id of every thread that this /proc shows; those that vanish meanwhile are left out."""
    for pid in processes():
        try:
            yield from threads(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue


def uses_mounts(pid: int, mounts: Collection[int]) -> bool:
    """Whether a process has a file of certain mounts open, runs one, or has its root or working directory there.

    False for a process that is gone.
    """
    try:
        if any(mount_id(pid, int(fd)) in mounts for fd in os.listdir(f"/proc/{pid}/fdinfo")):  # noqa: PTH208 - any type
            return True
        return any(_mount_of(f"/proc/{pid}/{link}") in mounts for link in ("cwd", "root", "exe"))
    except (FileNotFoundError, ProcessLookupError):
        return False


def _mount_of(path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return statx.mount_id(fd)
    finally:
        os.close(fd)


def parent(pid: int) -> int:
    """Return the parent of a process; 0 where it is outside this process's pid namespace."""
    return int(_status_field(pid, b"PPid"))


def is_stopped(tid: int) -> bool:
    """Whether a thread was stopped, by a signal or a tracer.

    /proc shows the call that it returns from as if it waited in it. One that waits indeed, and is to be stopped as it
    returns, is not stopped yet.
    """
    return _status_field(tid, b"State").strip()[:1] in (b"T", b"t")


def is_dying(tid: int) -> bool:
    """Whether a thread ends, has ended and is there still, or was killed and cannot end for what it waits for."""
    flags = int(record(tid, "stat").rpartition(b")")[2].split()[6])
    return bool(flags & _PF_EXITING) or bool(int(_status_field(tid, b"SigPnd"), 16) & 1 << (signal.SIGKILL - 1))


def is_first_of_child_namespace(pid: int) -> bool:
    """Whether a process is PID 1 of a pid namespace that is a direct child of this /proc's."""
    return _status_field(pid, b"NStgid").split()[1:] == [b"1"]


def _status_field(pid: int, name: bytes) -> bytes:
    for line in record(pid, "status").splitlines():
        if line.startswith(name + b":"):
            return line[len(name) + 1 :]
    raise ValueError(f"/proc/{pid}/status has no {name.decode()}")


def root_path(pid: int | str) -> bytes:
    """Return where the root directory of a process lies in its mount namespace."""
    return os.readlink(f"/proc/{pid}/root".encode())  # noqa: PTH115 - bytes: a path need not be UTF-8
