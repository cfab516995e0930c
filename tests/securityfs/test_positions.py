"""Reading and writing through one descriptor: IPE's write handlers leave the file position where it is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.linux import syscalls
from tests.securityfs.emulator import Emulator, mounted

pytestmark = [pytest.mark.needs("fuse", "root"), pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with mounted(tmp_path_factory.mktemp("positions") / "m") as emulator:
        yield emulator


@pytest.fixture
def node(emulator: Emulator) -> Path:
    node = emulator.ipe / "success_audit"
    node.write_bytes(b"0")
    return node


@pytest.fixture
def fd(node: Path) -> Iterator[int]:
    fd = os.open(node, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_write_leaves_the_position_to_the_next_read(fd: int) -> None:
    assert os.write(fd, b"1") == 1
    assert os.read(fd, 10) == b"1"
    assert os.read(fd, 10) == b""
    assert os.write(fd, b"0\n") == 2
    assert os.read(fd, 10) == b""


def test_so_do_writes_of_every_length_and_kind(fd: int) -> None:
    assert os.write(fd, b"1\n") == 2
    assert os.writev(fd, [b"0", b"1"]) == 2
    assert os.pwrite(fd, b"1", 7) == 1
    assert os.write(fd, b"1" * (3 << 20)) == 3 << 20
    assert os.read(fd, 10) == b"1"


def test_a_read_before_the_write_counts(fd: int) -> None:
    assert os.read(fd, 10) == b"0"
    assert os.write(fd, b"1") == 1
    assert os.read(fd, 10) == b""


def test_reads_at_an_offset_neither_move_nor_are_moved(fd: int) -> None:
    assert os.pread(fd, 10, 0) == b"0"
    assert os.write(fd, b"1") == 1
    for _ in range(3):
        assert os.pread(fd, 10, 1) == b""  # where FUSE's own position is
        assert os.pread(fd, 10, 0) == b"1"
    assert os.read(fd, 10) == b"1"
    assert os.pread(fd, 10, 0) == b"1"


def test_appending_descriptors_too(node: Path) -> None:
    fd = os.open(node, os.O_RDWR | os.O_APPEND)
    try:
        for value in (b"1", b"0"):
            assert os.write(fd, value) == 1
        assert os.read(fd, 10) == b"0"
        assert os.write(fd, b"1") == 1
        assert os.read(fd, 10) == b""
    finally:
        os.close(fd)


def test_whoever_else_holds_the_descriptor_shares_the_position(fd: int) -> None:
    code = "import os, sys; fd = int(sys.argv[1]); os.write(fd, b'1'); print(os.read(fd, 10).decode())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "1\n"
    assert os.read(fd, 10) == b""


def test_a_refused_write_moves_nothing(fd: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.write(fd, b"x")
    assert os.read(fd, 10) == b"0"


def test_an_offset_of_minus_one_is_the_position(fd: int) -> None:
    data = syscalls.writable(1)
    data.raw = b"1"
    vector = (syscalls.address(data)).to_bytes(8, sys.byteorder) + (1).to_bytes(8, sys.byteorder)
    assert syscalls.call("pwritev2", fd, vector, 1, -1, -1, 0) == 1
    assert syscalls.call("preadv2", fd, vector, 1, -1, -1, 0) == 1
    assert data.raw == b"1"
    assert os.read(fd, 10) == b""
