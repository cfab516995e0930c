import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ipe_emu.linux import procfs, statx, syscalls
from ipe_emu.linux.capabilities import Capability


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # nothing announces that a process has gone to sleep


def test_own_credentials() -> None:
    own = procfs.credentials(os.getpid())
    assert (own.tgid, own.uid, own.euid, own.fsuid) == (os.getpid(), os.getuid(), os.geteuid(), os.geteuid())
    assert (own.gid, own.egid, own.fsgid) == (os.getgid(), os.getegid(), os.getegid())
    assert set(own.groups) == set(os.getgroups())
    assert own.has(Capability.MAC_ADMIN) == (os.geteuid() == 0)


@pytest.mark.needs("root")
def test_credentials_of_another() -> None:
    drop = ["setpriv", "--reuid", "1234", "--regid", "77", "--groups", "5,6"]
    with subprocess.Popen([*drop, "cat"], stdin=subprocess.PIPE) as process:
        wait_for(lambda: procfs.comm(process.pid) == b"cat")
        found = procfs.credentials(process.pid)
        assert (found.fsuid, found.fsgid, found.groups, found.cap_effective) == (1234, 77, (5, 6), 0)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.needs("root")
def test_a_record_longer_than_a_page_is_read_whole() -> None:
    groups = tuple(range(1_000_000, 1_001_000))
    drop = ["setpriv", "--groups", ",".join(map(str, groups))]
    with subprocess.Popen([*drop, "cat"], stdin=subprocess.PIPE) as process:
        wait_for(lambda: procfs.comm(process.pid) == b"cat")
        assert procfs.credentials(process.pid).groups == groups
        assert process.stdin is not None
        process.stdin.close()


def test_kept_records_are_those_of_one_thread() -> None:
    kept = procfs.KeptRecords()
    first = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    with first, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as second:
        wait_for(lambda: (call := procfs.current_syscall(first.pid)) is not None and call.name == "read")
        call = procfs.current_syscall(first.pid)
        assert call is not None
        for _ in range(2):
            assert procfs.waits_in(first.pid, {b"%d" % call.number}, call.arguments[2], kept.record) == 0
        for process in (first, second, first):
            found = procfs.descriptor_inode(process.pid, 0, kept.record)
            assert found == procfs.descriptor_inode(process.pid, 0)
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.close()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        kept.record(first.pid, "syscall")
    kept.close()


def test_a_kept_record_changes_with_its_descriptor(tmp_path: Path) -> None:
    kept = procfs.KeptRecords()
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.touch()
        fd = os.open(file, os.O_RDONLY)
        assert procfs.descriptor_inode(os.getpid(), fd, kept.record) == file.stat().st_ino
        os.close(fd)
        assert procfs.descriptor_inode(os.getpid(), fd, kept.record) is None
    kept.close()


def test_a_name_is_given_as_it_is() -> None:
    ctypes.CDLL(None).prctl(15, b"a b\n\xff")
    try:
        assert procfs.comm(threading.get_native_id()) == b"a b\n\xff"
    finally:
        ctypes.CDLL(None).prctl(15, b"pytest")


def test_the_waiting_system_call_of_a_thread() -> None:
    readable, writable = os.pipe()
    outcome: list[bytes] = []
    tids: list[int] = []

    def read() -> None:
        tids.append(threading.get_native_id())
        outcome.append(os.read(readable, 123))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: bool(tids) and (call := procfs.current_syscall(tids[0])) is not None and call.name == "read")
        call = procfs.current_syscall(tids[0])
        assert call is not None
        assert call.arguments[0] == readable
        assert call.arguments[2] == 123
        assert procfs.descriptor_inode(tids[0], readable) == os.fstat(readable).st_ino
        assert tids[0] in procfs.threads(os.getpid())
        assert tids[0] in set(procfs.all_threads())
    finally:
        os.write(writable, b"x")
        reader.join()
        os.close(readable)
        os.close(writable)


def test_a_closed_descriptor_has_no_inode() -> None:
    assert procfs.descriptor_inode(os.getpid(), 987654) is None


def test_memory() -> None:
    data = ctypes.create_string_buffer(os.urandom(3 << 20))
    address = ctypes.addressof(data)
    assert procfs.read_memory(os.getpid(), address, len(data.raw)) == data.raw
    assert procfs.read_memory(os.getpid(), address, 0) == b""
    with pytest.raises(OSError, match="Input/output"):
        procfs.read_memory(os.getpid(), 4096, 8)


def test_memory_that_the_task_itself_cannot_read() -> None:
    """Mapped or not: a system call of the task would not get it either."""
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pointer = ctypes.c_char.from_buffer(memory)
        middle = ctypes.addressof(pointer) + mmap.PAGESIZE
        memory[mmap.PAGESIZE - 4 : mmap.PAGESIZE] = b"last"
        assert procfs.copy_from_user(os.getpid(), middle - 4, 4 + mmap.PAGESIZE)[:4] == b"last"
        syscalls.call("mprotect", middle, mmap.PAGESIZE, 0)
        assert procfs.copy_from_user(os.getpid(), middle - 4, 4) == b"last"
        assert procfs.copy_from_user(os.getpid(), 4096, 0) == b""
        for address, length in ((middle - 4, 5), (middle, 1), (4096, 1)):
            with pytest.raises(OSError, match=r"Bad address|the memory ends early") as caught:
                procfs.copy_from_user(os.getpid(), address, length)
            assert caught.value.errno == errno.EFAULT
        del pointer


@pytest.mark.needs("user-namespaces")
def test_the_numbers_of_a_process_in_each_pid_namespace() -> None:
    assert procfs.process_ids(os.getpid())[0] == os.getpid()
    below = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "cat"]
    with subprocess.Popen(below, stdin=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: bool(children.read_text()))
        child = int(children.read_text())
        assert procfs.process_ids(child) == (child, 1)
        assert process.stdin is not None
        process.stdin.close()


def test_namespaces_are_told_apart() -> None:
    own = procfs.namespace("self", "user")
    assert own == Path("/proc/self/ns/user").stat().st_ino
    code = "from ipe_emu.linux import procfs; print(procfs.namespace('self', 'user'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert int(done.stdout) == own


@pytest.mark.needs("user-namespaces")
def test_the_namespace_of_a_process_in_another() -> None:
    with subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE) as process:
        wait_for(lambda: procfs.comm(process.pid) == b"cat")
        assert procfs.namespace(process.pid, "user") != procfs.namespace("self", "user")
        assert process.stdin is not None
        process.stdin.close()


def test_the_mount_of_a_descriptor() -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        mount = procfs.mount_id(os.getpid(), fd)
        assert statx.mount_id(fd) == mount
        assert statx.unique_mount_id(fd) != mount
    finally:
        os.close(fd)
    assert any(line.startswith(f"{mount} ") for line in Path("/proc/self/mountinfo").read_text().splitlines())


def test_who_is_gone_is_said_to_be() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    for ask in (procfs.credentials, procfs.comm, procfs.current_syscall, procfs.threads):
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            ask(process.pid)


@pytest.mark.needs("root")
def test_a_long_file_is_read_whole() -> None:
    """The kernel gives as many lines at a time as fit into a page: mountinfo has more on many machines."""
    program = (
        "import os, sys; sys.path[:0] = sys.argv[1:]\n"
        "from pathlib import Path\n"
        "from ipe_emu.linux import mounts, namespaces, procfs\n"
        "namespaces.unshare(namespaces.Namespace.MOUNT)\n"
        "mounts.make_private()\n"
        "for _ in range(120):\n"
        "    mounts.attach(mounts.new_filesystem(b'tmpfs', {}), Path('/mnt'))\n"
        "lines = procfs.read('self', 'mountinfo').splitlines()\n"
        "assert lines == Path('/proc/self/mountinfo').read_bytes().splitlines()\n"
        "assert len(lines) > 120\n"
    )
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", program, str(root), str(root / "fs")], check=True, timeout=60)
