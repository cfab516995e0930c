"""What a session serves beside the securityfs, through a real mount."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

from tests.rootless import ROOT
from tests.securityfs.beside_main import DEVICE

pytestmark = [pytest.mark.timeout(60), pytest.mark.needs("fuse", "root")]

PAGE = 4096


@frozen
class Beside:
    place: Path
    process: "subprocess.Popen[str]"

    def tell(self, what: str, name: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, name, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    directory = tmp_path_factory.mktemp("beside")
    good, bad, place = directory / "good", directory / "bad", directory / "place"
    place.mkdir()
    good.write_bytes(os.urandom(100 * PAGE + 17))
    bad.write_bytes(b"a" * 64 * PAGE + b"BAD" + b"b" * 64 * PAGE)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.securityfs.beside_main", str(place), str(good), str(bad)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Beside(place, process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def refusal(number: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, match=os.strerror(number), check=lambda error: error.errno == number)


def test_the_securityfs_is_one_directory(beside: Beside) -> None:
    assert sorted(path.name for path in beside.place.iterdir()) == ["devices", "images", "mapper", "security", "texts"]
    assert sorted(path.name for path in (beside.place / "security").iterdir()) == ["ipe", "lsm"]
    assert (beside.place / "security/ipe/enforce").read_bytes() == b"1"
    (beside.place / "security/ipe/enforce").write_bytes(b"0")
    assert (beside.place / "security/ipe/enforce").read_bytes() == b"0"


def test_an_image_is_a_file_for_reading(beside: Beside) -> None:
    image = beside.place / "images/good"
    content = (beside.place.parent / "good").read_bytes()
    assert image.read_bytes() == content
    status = image.stat()
    assert (status.st_size, status.st_mode) == (len(content), stat.S_IFREG | 0o400)
    with image.open("rb") as stream:
        assert os.pread(stream.fileno(), 5000, 50 * PAGE + 1) == content[50 * PAGE + 1 : 50 * PAGE + 5001]
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with refusal(errno.EACCES):
            os.open(image, flags)
    with refusal(errno.EROFS):
        image.chmod(0o777)
    with refusal(errno.EPERM):
        image.unlink()


def test_only_the_read_of_what_is_bad_fails(beside: Beside) -> None:
    fd = os.open(beside.place / "images/bad", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else the read before it may be for the bad page as well
        assert os.pread(fd, PAGE, 0) == b"a" * PAGE
        with refusal(errno.EIO):
            os.pread(fd, PAGE, 64 * PAGE)
        assert os.pread(fd, PAGE, 128 * PAGE) == b"b" * 3
    finally:
        os.close(fd)


def test_a_text_is_that_of_the_moment_it_was_opened(beside: Beside) -> None:
    text = beside.place / "texts/count"
    assert (text.stat().st_size, text.stat().st_mode) == (0, stat.S_IFREG | 0o444)
    with text.open() as first, text.open() as second:
        numbers = [int(first.read()), int(second.read())]
        assert numbers[1] == numbers[0] + 1
        first.seek(0)
        assert int(first.read()) == numbers[0]
    with refusal(errno.EROFS):
        os.open(text, os.O_WRONLY)


def test_device_nodes_come_and_go(beside: Beside) -> None:
    node = beside.place / "devices/dm-0"
    beside.tell("add", "dm-0")
    status = node.stat()
    assert (status.st_mode, status.st_rdev) == (stat.S_IFBLK | 0o660, DEVICE)
    node.chmod(0o600)
    os.chown(node, 0, 6)
    assert (node.stat().st_mode, node.stat().st_gid) == (stat.S_IFBLK | 0o600, 6)
    beside.tell("remove", "dm-0")
    assert not node.exists()
    beside.tell("add", "dm-0")
    assert node.stat().st_mode == stat.S_IFBLK | 0o660


def openers(beside: Beside) -> int:
    return int((beside.place / "texts/openers").read_text())


def test_a_disk_is_read_and_written(beside: Beside) -> None:
    path = beside.place / "images/254:0"
    assert (path.stat().st_size, path.stat().st_mode) == (65536, stat.S_IFREG | 0o600)
    assert openers(beside) == 0
    reader, writer = os.open(path, os.O_RDONLY), os.open(path, os.O_RDWR)
    assert openers(beside) == 2
    assert os.lseek(reader, 0, os.SEEK_END) == 65536
    assert os.pwrite(writer, b"hello", 40_000) == 5
    os.fsync(writer)
    assert os.pread(reader, 7, 39_999) == b"fhello5"
    assert os.pwrite(writer, b"x" * 100, 65_530) == 6
    with refusal(errno.ENOSPC):
        os.pwrite(writer, b"x", 65_536)
    with refusal(errno.EINVAL):
        os.ftruncate(writer, 100)
    assert os.pread(reader, 10, 65_536) == b""
    os.close(reader)
    os.close(writer)
    assert openers(beside) == 0


def test_a_read_ends_before_the_first_page_that_is_bad(beside: Beside) -> None:
    fd = os.open(beside.place / "images/254:0", os.O_RDONLY)
    try:
        assert len(os.pread(fd, 65_536, 100)) == 3 * PAGE - 100
        with refusal(errno.EIO):
            os.pread(fd, 65_536, 3 * PAGE)
        assert len(os.pread(fd, 65_536, 4 * PAGE)) == 12 * PAGE
    finally:
        os.close(fd)
