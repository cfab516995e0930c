"""Policy directories appear and vanish at once, for whoever looks, stays in them or watches them."""

import ctypes
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define, field

from tests.securityfs.emulator import Emulator
from tests.securityfs.policies import policy

pytestmark = [pytest.mark.needs("fuse", "root"), pytest.mark.timeout(60)]

IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_ISDIR = 0x100, 0x200, 0x400, 0x40000000
_EVENT = struct.Struct("=iIII")


@define
class Watcher:
    """inotify(7) on some directories."""

    fd: int = field(init=False)
    libc: ctypes.CDLL = field(factory=lambda: ctypes.CDLL(None, use_errno=True))

    def __attrs_post_init__(self) -> None:
        self.fd = self.libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        assert self.fd >= 0

    def watch(self, path: Path) -> None:
        assert self.libc.inotify_add_watch(self.fd, os.fsencode(path), 0xFFF) >= 0

    def events(self) -> list[tuple[int, bytes]]:
        """What has been reported so far, openings and accesses left out."""
        found = []
        while select.select([self.fd], [], [], 0)[0]:
            data = os.read(self.fd, 1 << 16)
            while data:
                _, mask, _, length = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                data = data[_EVENT.size + length :]
                if mask & (IN_CREATE | IN_DELETE | IN_DELETE_SELF):
                    found.append((mask, name))
        return found


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    os.close(watcher.fd)


def load(emulator: Emulator, name: str, version: str = "1.0.0") -> Path:
    (emulator.ipe / "new_policy").write_bytes(policy(name, version))
    return emulator.policies / name


def delete(directory: Path) -> None:
    (directory / "delete").write_bytes(b"1")


def test_removals_are_reported_to_watchers_and_creations_are_not(emulator: Emulator, watcher: Watcher) -> None:
    """As the kernel has it: no event for a new directory, and that of a removal is out with the write."""
    watcher.watch(emulator.policies)
    directory = load(emulator, "Watched")
    assert watcher.events() == []
    delete(directory)
    assert watcher.events() == [(IN_DELETE | IN_ISDIR, b"Watched")]


def test_no_name_outlives_its_policy(emulator: Emulator) -> None:
    """What another process has looked up, listed and opened is gone for it with the write that deletes it."""
    look = (
        "import os, sys\n"
        "path = sys.argv[1]\n"
        "for line in sys.stdin:\n"
        "    print(os.path.exists(path), os.path.basename(path) in os.listdir(os.path.dirname(path)), flush=True)\n"
    )
    directory = emulator.policies / "Seen"
    with subprocess.Popen(
        [sys.executable, "-c", look, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def sees() -> str:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write("look\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        for _ in range(5):
            assert sees() == "False False"
            load(emulator, "Seen")
            assert sees() == "True True"
            delete(directory)
            assert sees() == "False False"
        other.stdin.close()


def test_descriptors_and_working_directories_of_a_deleted_policy_say_enoent(emulator: Emulator) -> None:
    directory = load(emulator, "Held")
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    name = os.open(directory / "name", os.O_RDONLY)
    active = os.open(directory / "active", os.O_RDWR)
    update = os.open(directory / "update", os.O_WRONLY)
    pkcs7 = os.open(directory / "pkcs7", os.O_RDONLY)
    script = f"cd {directory} && echo 1 > delete; ls; cat name; test -e version; echo $?; cd .. && ls"
    done = subprocess.run(["busybox", "sh", "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.split() == ["1", "AllowInitramfs"]
    assert "can't open 'name': No such file or directory" in done.stderr
    try:
        for fd in (name, active, pkcs7):
            with pytest.raises(FileNotFoundError):
                os.read(fd, 10)
        for fd, data in ((active, b"1"), (update, policy("Held", "2.0.0"))):
            with pytest.raises(FileNotFoundError):
                os.write(fd, data)
        assert os.listdir(at) == []  # noqa: PTH208 - glibc makes an end of the ENOENT
        with pytest.raises(FileNotFoundError):
            os.open("name", os.O_RDONLY, dir_fd=at)
        assert os.fstat(at).st_nlink == 0
        # A policy of the same name is another one.
        again = load(emulator, "Held", "3.0.0")
        with pytest.raises(FileNotFoundError):
            os.read(name, 10)
        assert (again / "version").read_bytes() == b"3.0.0"
    finally:
        for fd in (at, name, active, update, pkcs7):
            os.close(fd)


def test_inode_numbers_are_never_given_twice(emulator: Emulator) -> None:
    seen: set[int] = set()
    for _ in range(10):
        directory = load(emulator, "Again")
        numbers = {directory.stat().st_ino, *(node.stat().st_ino for node in directory.iterdir())}
        assert len(numbers) == 8
        assert not numbers & seen
        seen |= numbers
        delete(directory)


def test_the_newest_is_listed_first(emulator: Emulator) -> None:
    for name in ("First", "Second", "Third"):
        load(emulator, name)
    with os.scandir(emulator.policies) as entries:
        assert [entry.name for entry in entries] == ["Third", "Second", "First", "AllowInitramfs"]
    assert emulator.policies.stat().st_nlink == 6
    listed = subprocess.run(["ls", "-Ua", emulator.policies / "First"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [
        ".", "..", "delete", "update", "active", "version", "name", "policy", "pkcs7",
    ]  # fmt: skip


def test_a_watcher_that_comes_and_goes_while_policies_do(emulator: Emulator) -> None:
    """Lookups, listings and removals at the same time: nothing waits for anything for ever."""
    over = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not over.is_set():
                for entry in os.listdir(emulator.policies):  # noqa: PTH208 - names alone, without a Path for each
                    try:
                        (emulator.policies / entry / "version").read_bytes()
                        os.listdir(emulator.policies / entry)  # noqa: PTH208 - names alone, without a Path for each
                    except FileNotFoundError:
                        continue
        except BaseException as error:
            failures.append(error)

    lookers = [threading.Thread(target=look) for _ in range(4)]
    for looker in lookers:
        looker.start()
    try:
        for number in range(40):
            delete(load(emulator, f"Brief{number % 3}"))
    finally:
        over.set()
        for looker in lookers:
            looker.join(20)
    assert failures == []
    assert emulator.names() == {"AllowInitramfs"}
