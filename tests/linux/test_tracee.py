"""Reading another process through /proc."""

import mmap
import os
from pathlib import Path

import pytest

from ipe_emu.linux import syscalls
from ipe_emu.linux.tracee import Status, Tracee, parse_mapping

PAGE = 4096


@pytest.fixture
def myself() -> Tracee:
    return Tracee(os.getpid())


@pytest.fixture
def page() -> int:
    """The address of a page that no page follows."""
    address = syscalls.call("mmap", 0, 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    syscalls.call("munmap", address + PAGE, PAGE)
    return address


def write(address: int, data: bytes) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        assert os.pwrite(fd, data, address) == len(data)
    finally:
        os.close(fd)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 4094])
def test_strings_up_to_the_end_of_memory(myself: Tracee, page: int, length: int) -> None:
    start = page + PAGE - length - 1
    write(start, b"x" * length + b"\0")
    assert myself.string(start, 4096) == b"x" * length


def test_strings_without_an_end(myself: Tracee, page: int) -> None:
    write(page, b"x" * PAGE)
    assert myself.string(page, 4096) is None
    with pytest.raises(OSError, match="Errno 14"):
        myself.string(page + 1, 4096)


@pytest.mark.parametrize("address", [0, 8, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096])
def test_impossible_addresses(myself: Tracee, address: int) -> None:
    with pytest.raises(OSError, match="Errno 14"):
        myself.string(address, 4096)
    with pytest.raises(OSError, match="Errno 14"):
        myself.memory(address, 10)


def test_memory_that_the_thread_itself_cannot_read(myself: Tracee, page: int) -> None:
    write(page, b"secret\0")
    syscalls.call("mprotect", page, PAGE, 0)
    try:
        with pytest.raises(OSError, match="Errno 14"):
            myself.string(page, 4096)
    finally:
        syscalls.call("mprotect", page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_memory_that_ends(myself: Tracee, page: int) -> None:
    write(page, b"y" * PAGE)
    assert myself.memory(page + PAGE - 10, 100) == b"y" * 10


def test_the_status_of_oneself(myself: Tracee) -> None:
    status = myself.status
    assert status.tgid == os.getpid()
    assert status.parent == os.getppid()
    assert status.fsuid == os.geteuid()
    assert status.fsgid == os.getegid()
    assert set(status.groups) == set(os.getgroups())
    assert status.ns_tgids[0] == os.getpid()


def test_a_name_cannot_pose_as_another_line() -> None:
    status = Status(b"Name:\ta\\nTgid:\\t7\nUmask:\t0022\nTgid:\t5\nPid:\t6\n")
    assert status.name == b"a\\nTgid:\\t7"
    assert status.tgid == 5
    with pytest.raises(ValueError, match="not found"):
        _ = status.fsuid
    with pytest.raises(ValueError, match="begins unexpectedly"):
        _ = Status(b"").name


def test_mappings_in_a_range(myself: Tracee, page: int) -> None:
    (found,) = myself.mappings(page, page + 1)
    assert found.start <= page < found.end
    assert (found.readable, found.executable, found.shared, found.path) == (True, False, False, b"")
    assert list(myself.mappings(0, PAGE)) == []


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"1000-2000 r-xp 00001000 fd:01 77                         /usr/bin/x\n", b"/usr/bin/x"),
        (b"1000-2000 r-xp 00001000 fd:01 77                         /a b  c (deleted)\n", b"/a b  c (deleted)"),
        (b"1000-2000 r-xp 00001000 fd:01 77 /a\\012b\n", b"/a\nb"),
    ],
)
def test_mapping_lines(line: bytes, path: bytes) -> None:
    mapping = parse_mapping(line)
    assert (mapping.start, mapping.end, mapping.executable, mapping.path) == (0x1000, 0x2000, True, path)
    assert (mapping.dev, mapping.ino) == (os.makedev(0xFD, 1), 77)


def test_descriptors(myself: Tracee) -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        assert myself.flags_of_fd(fd) & os.O_PATH
        assert myself.flags_of_fd(fd) & os.O_CLOEXEC
        assert myself.stat_fd(fd).st_ino == Path("/proc").stat().st_ino
    finally:
        os.close(fd)
    for read in (myself.flags_of_fd, myself.stat_fd, myself.open_fd):
        with pytest.raises(FileNotFoundError):
            read(fd)
