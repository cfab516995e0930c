"""A thread that waits in a system call, as /proc shows it: its memory, its identity, its files, its mappings.

What is read here belongs to the thread only if its notification is still valid afterwards: a pid can be reused.
"""

import errno
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ipe_emu.linux import syscalls

_PAGE: Final = 4096
#: An entry of the auxiliary vector: its kind and its value.
_AUXV: Final = struct.Struct("=QQ")
_AT_RANDOM: Final = 25
# Most strings that are read are paths, and most paths are shorter.
_CHUNK: Final = 256
_PIECE: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_PATH_ONLY: Final = os.O_PATH | os.O_CLOEXEC
#: struct iovec: address and length.
_IOVEC: Final = struct.Struct("=QQ")
# No /proc file that is read here is longer, but for mountinfo and maps.
_SMALL_FILE: Final = 1 << 16


class Status:
    """What /proc/PID/status says, with ids as the reader's user namespace has them. Parsed as it is asked.

    Every attribute raises ValueError if the text is not that of such a file.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text

    @property
    def name(self) -> bytes:
        """The thread's name, with newlines and backslashes escaped."""
        if not self._text.startswith(b"Name:\t"):
            raise ValueError("/proc/PID/status begins unexpectedly")
        return self._text[6 : self._text.index(b"\n")]

    @property
    def tgid(self) -> int:
        """The process's id in the reader's pid namespace."""
        return int(self._line(b"\nTgid:\t"))

    @property
    def parent(self) -> int:
        """The parent's process id in the reader's pid namespace, 0 if it is not in it."""
        return int(self._line(b"\nPPid:\t"))

    @property
    def ns_tgids(self) -> tuple[int, ...]:
        """The process's id in each pid namespace that it is in, from the reader's to its own."""
        return tuple(map(int, self._line(b"\nNStgid:\t").split()))

    @property
    def ns_pids(self) -> tuple[int, ...]:
        """The thread's id in the same namespaces."""
        return tuple(map(int, self._line(b"\nNSpid:\t").split()))

    @property
    def fsuid(self) -> int:
        """The user id that counts for files."""
        return int(self._line(b"\nUid:\t").split()[3])

    @property
    def fsgid(self) -> int:
        """The group id that counts for files."""
        return int(self._line(b"\nGid:\t").split()[3])

    @property
    def groups(self) -> tuple[int, ...]:
        """The supplementary groups."""
        return tuple(map(int, self._line(b"\nGroups:\t").split()))

    @property
    def umask(self) -> int:
        """The file mode creation mask."""
        return int(self._line(b"\nUmask:\t"), 8)

    def capable(self, capability: int) -> bool:
        """Whether a capability is in the effective set (of the thread's own user namespace)."""
        return bool(int(self._line(b"\nCapEff:\t"), 16) >> capability & 1)

    def _line(self, key: bytes) -> bytes:
        # The name comes first and holds no bare newline, so that it cannot look like another line.
        begin = self._text.index(key) + len(key)
        return self._text[begin : self._text.index(b"\n", begin)]


class Mapping(NamedTuple):
    """One line of /proc/PID/maps; ``path`` is empty for anonymous memory and ``[name]`` for the kernel's own."""

    start: int
    end: int
    readable: bool
    executable: bool
    shared: bool
    dev: int
    ino: int
    path: bytes


class Tracee:
    """One waiting thread. Everything raises OSError, ESRCH or ENOENT among them if the thread is gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._proc = b"/proc/%d/" % pid
        self._status: Status | None = None

    @property
    def status(self) -> Status:
        """What /proc/PID/status says, read once."""
        if self._status is None:
            self._status = Status(self._read(b"status"))
        return self._status

    def comm(self) -> bytes:
        """Return the thread's name, at most 15 bytes, any but NUL."""
        name = self.status.name
        return self._read(b"comm").removesuffix(b"\n") if b"\\" in name else name

    def user_namespace(self) -> int:
        """Return the inode number that identifies the thread's user namespace."""
        return os.stat(self._proc + b"ns/user").st_ino  # noqa: PTH116 - built from bytes once

    def start_time(self) -> bytes:
        """Return when the thread started, in clock ticks since boot; with the pid it identifies the thread."""
        return start_time(self._read(b"stat"))

    def random_bytes(self) -> bytes:
        """Return the 16 bytes that execve(2) gave the program (getauxval(3), AT_RANDOM): others with each program."""
        auxv = self._read(b"auxv")
        for offset in range(0, len(auxv) - _AUXV.size + 1, _AUXV.size):
            kind, value = _AUXV.unpack_from(auxv, offset)
            if kind == _AT_RANDOM:
                return self.memory(value, 16)
        return b""

    # -- memory -------------------------------------------------------------------------------------------------

    def string(self, address: int, limit: int) -> bytes | None:
        """Return the NUL-terminated string at ``address``; None if there is no NUL within ``limit`` bytes.

        Raises OSError EFAULT where the thread itself could not read the memory.
        """
        found = b""
        while len(found) < limit:
            # Never across a page border in one read: the next page may not be there.
            size = min(_PAGE - (address + len(found)) % _PAGE, limit - len(found), _CHUNK)
            piece = self._copied(address + len(found), size)
            end = piece.find(b"\0")
            if end >= 0:
                return found + piece[:end]
            if not piece:
                raise OSError(errno.EFAULT, "end of memory")
            found += piece
        return None

    def memory(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes at ``address``, or fewer if the rest cannot be read; OSError EFAULT if nothing can."""
        found = bytearray()
        while len(found) < size:
            try:
                piece = self._copied(address + len(found), min(size - len(found), _PIECE))
            except OSError as error:
                if not found or error.errno != errno.EFAULT:
                    raise
                break
            if not piece:
                break
            found += piece
        return bytes(found)

    def _copied(self, address: int, size: int) -> bytes:
        # Not through /proc/PID/mem, which takes longer to open and reads PROT_NONE memory as well.
        ours = syscalls.writable(size)
        here, there = _IOVEC.pack(syscalls.address(ours), size), _IOVEC.pack(address, size)
        count = syscalls.call("process_vm_readv", self.pid, here, 1, there, 1, 0)
        return ours.raw[:count]

    def write_memory(self, address: int, data: bytes) -> None:
        """Write ``data`` to ``address``; OSError EFAULT where the thread itself could not."""
        # Not through /proc/PID/mem, which writes to read-only memory as well, as debuggers want it.
        ours = syscalls.writable(len(data))
        ours.raw = data
        vectors = (_IOVEC.pack(syscalls.address(ours), len(data)), _IOVEC.pack(address, len(data)))
        if syscalls.call("process_vm_writev", self.pid, vectors[0], 1, vectors[1], 1, 0) < len(data):
            raise OSError(errno.EFAULT, "end of memory")

    # -- files --------------------------------------------------------------------------------------------------

    def open_program(self) -> int:
        """Return an O_PATH descriptor of the program that the thread runs (``mm->exe_file``)."""
        return os.open(self._proc + b"exe", _PATH_ONLY)

    def open_root(self) -> int:
        """Return an O_PATH descriptor of the thread's root directory."""
        return os.open(self._proc + b"root", _PATH_ONLY)

    def root_path(self) -> bytes:
        """Return where the root directory lies in its mount namespace: ``/``, or the directory of a chroot(2)."""
        return os.readlink(self._proc + b"root")  # noqa: PTH115 - built from bytes once

    def open_cwd(self) -> int:
        """Return an O_PATH descriptor of the thread's working directory."""
        return os.open(self._proc + b"cwd", _PATH_ONLY)

    def open_fd(self, fd: int) -> int:
        """Return an O_PATH descriptor of what descriptor ``fd`` is open on. FileNotFoundError if closed."""
        return os.open(self._proc + b"fd/%d" % fd, _PATH_ONLY)

    def stat_fd(self, fd: int) -> os.stat_result:
        """Return the status of what descriptor ``fd`` is open on. FileNotFoundError if closed."""
        return os.stat(self._proc + b"fd/%d" % fd)  # noqa: PTH116 - built from bytes once

    def flags_of_fd(self, fd: int) -> int:
        """Return the open(2) flags of descriptor ``fd``, O_CLOEXEC included. FileNotFoundError if closed."""
        for line in self._read(b"fdinfo/%d" % fd).split(b"\n"):
            if line.startswith(b"flags:"):
                return int(line[6:], 8)
        raise OSError(errno.EIO, "no flags in fdinfo")

    def mappings(self, start: int, end: int) -> Iterator[Mapping]:
        """Return the memory mappings that overlap ``start`` to ``end``, lowest address first."""
        with open(self._proc + b"maps", "rb") as lines:  # noqa: PTH123 - built from bytes once
            for line in lines:
                mapping = parse_mapping(line)
                if mapping.start >= end:
                    return
                if mapping.end > start:
                    yield mapping

    def flags_of_mapping(self, mapping: Mapping) -> frozenset[bytes] | None:
        """Return the flags of a mapping, two letters each (proc_pid_smaps(5)); None where the kernel shows none.

        That takes the kernel long: it counts the pages of every mapping up to this one.
        """
        head = b"%08x-%08x " % (mapping.start, mapping.end)
        try:
            lines = open(self._proc + b"smaps", "rb")  # noqa: PTH123, SIM115 - built from bytes once; closed below
        except FileNotFoundError:
            return None
        with lines:
            for line in lines:
                if line.startswith(head):
                    break
            for line in lines:
                if line.startswith(b"VmFlags:"):
                    return frozenset(line.split()[1:])
        return None

    def open_mapping(self, mapping: Mapping) -> int:
        """Return an O_PATH descriptor of a mapping's file. PermissionError without CAP_SYS_ADMIN over the machine."""
        return os.open(self._proc + b"map_files/%x-%x" % (mapping.start, mapping.end), _PATH_ONLY)

    def _read(self, name: bytes) -> bytes:
        fd = os.open(self._proc + name, _READ)
        try:
            return os.read(fd, _SMALL_FILE)
        finally:
            os.close(fd)


def start_time(stat: bytes) -> bytes:
    """Return the field ``starttime`` of the content of a /proc/PID/stat."""
    return stat.rpartition(b")")[2].split()[19]


def parse_mapping(line: bytes) -> Mapping:
    """Parse one line of /proc/PID/maps (``show_map_vma()``): the path may hold blanks, a newline in it is escaped."""
    fields = line.rstrip(b"\n").split(None, 5)
    start, _, end = fields[0].partition(b"-")
    permissions = fields[1]
    major, _, minor = fields[3].partition(b":")
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        readable=permissions[:1] == b"r",
        executable=permissions[2:3] == b"x",
        shared=permissions[3:4] == b"s",
        dev=os.makedev(int(major, 16), int(minor, 16)),
        ino=int(fields[4]),
        path=fields[5].replace(b"\\012", b"\n") if len(fields) > 5 else b"",
    )
