"""Every reader that scripts use gets every node's content, or the kernel's error; none gets a silent nothing."""

import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.securityfs.emulator import Emulator, mounted
from tests.securityfs.policies import policy, text

pytestmark = [pytest.mark.needs("fuse", "root", "busybox"), pytest.mark.timeout(60)]

SENDFILE = "import os, sys; sys.exit(os.sendfile(1, os.open(sys.argv[1], os.O_RDONLY), 0, 1 << 16) < 1)"
SPLICE = (
    "import os, sys; r, w = os.pipe(); n = os.splice(os.open(sys.argv[1], os.O_RDONLY), w, 1 << 16);"
    " os.write(1, os.read(r, n or 1))"
)
READ = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
SHUTIL = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"

#: {node} is what is read; {copy} a file that the reader makes, whose content is then compared instead of its output.
READERS = {
    "cat": "cat {node}",
    "cat to a pipe": "cat {node} | cat",
    "cat from stdin": "cat < {node}",
    "busybox cat": "busybox cat {node}",
    "busybox cat to a pipe": "busybox cat {node} | cat",
    "busybox cat from stdin": "busybox cat < {node}",
    "cp": "cp {node} {copy}",
    "busybox cp": "busybox cp {node} {copy}",
    "install": "install -m 600 {node} {copy}",
    "dd": "dd if={node} bs=512 status=none",
    "dd, tiny blocks": "dd if={node} bs=7 status=none",
    "busybox dd": "busybox dd if={node} bs=7 2>&-",
    "tee": "tee {copy} < {node} >/dev/null",
    "busybox tee": "busybox tee {copy} < {node} >/dev/null",
    "head": "head -c 65536 {node}",
    "busybox head": "busybox head -c 65536 {node}",
    "tail": "tail -c +1 {node}",
    "busybox tail": "busybox tail -c +1 {node}",
    "grep": "grep -a '' {node}",
    "busybox grep": "busybox grep -a '' {node}",
    "sed": "sed '' {node}",
    "shell read": "while IFS= read -r line || [ -n \"$line\" ]; do printf '%s\\n' \"$line\"; done < {node}",
    "python read": f"{sys.executable} -c \"{READ}\" {{node}}",
    "python shutil": f"{sys.executable} -c \"{SHUTIL}\" {{node}} {{copy}}",
    "sendfile": f"{sys.executable} -c \"{SENDFILE}\" {{node}} | cat",
    "splice": f"{sys.executable} -c \"{SPLICE}\" {{node}}",
}  # fmt: skip
#: These end the last line where the node does not.
COMPLETES_LINES = {"grep", "busybox grep", "shell read"}
#: These do not tell of an error on any file system.
NEVER_TELL = {"shell read", "busybox grep", "busybox tee"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with mounted(tmp_path_factory.mktemp("readers") / "m") as emulator:
        (emulator.ipe / "new_policy").write_bytes(policy("Signed"))
        yield emulator


def expected_contents(emulator: Emulator) -> dict[Path, bytes]:
    signed = emulator.policies / "Signed"
    return {
        emulator.directory / "lsm": (emulator.directory / "lsm").read_bytes(),
        emulator.ipe / "enforce": b"1",
        emulator.ipe / "success_audit": b"0",
        signed / "name": b"Signed",
        signed / "version": b"1.0.0",
        signed / "active": b"0",
        signed / "policy": text("Signed"),
        signed / "pkcs7": policy("Signed"),
    }


def run(script: str, node: Path, copy: Path) -> subprocess.CompletedProcess[bytes]:
    copy.unlink(missing_ok=True)
    return subprocess.run(
        ["sh", "-c", script.format(node=node, copy=copy)], capture_output=True, timeout=20, check=False
    )


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_every_node(name: str, shown: Emulator, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for node, content in expected_contents(shown).items():
        if b"\0" in content and name in COMPLETES_LINES:
            continue  # not a text: these readers change it on any file system
        done = run(READERS[name], node, copy)
        got = copy.read_bytes() if "{copy}" in READERS[name] else done.stdout
        if name in COMPLETES_LINES and not content.endswith(b"\n"):
            got = got.removesuffix(b"\n")
        assert (done.returncode, got) == (0, content), f"{node}: {done.stderr!r}"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("node", ["new_policy", "policies/AllowInitramfs/pkcs7", "policies/Signed/delete"])
def test_no_reader_takes_an_error_for_an_empty_node(name: str, node: str, shown: Emulator, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    done = run(READERS[name], shown.ipe / node, copy)
    assert done.stdout == b""
    assert not copy.exists() or copy.read_bytes() == b""
    assert done.returncode != 0 or done.stderr or name in NEVER_TELL


def test_wc_believes_no_size_of_what_cannot_be_read(shown: Emulator) -> None:
    done = subprocess.run(["wc", "-c", shown.ipe / "new_policy"], capture_output=True, timeout=20, check=False)
    assert done.returncode != 0
    assert b"Invalid argument" in done.stderr


def test_a_size_shows_only_until_somebody_has_read(shown: Emulator) -> None:
    """The kernel's is always 0: nobody sees another but beside a reader who has not read to the end yet."""
    node = shown.policies / "Signed" / "policy"
    content = text("Signed")
    assert node.stat().st_size == 0
    with node.open("rb", buffering=0) as stream:
        assert os.fstat(stream.fileno()).st_size == len(content)
        assert stream.read(10) == content[:10]
        assert os.fstat(stream.fileno()).st_size == len(content)  # the rest might come by sendfile
        deadline = time.monotonic() + 20
        # a reader of a whole page that is not seen to wait, for it has not gone to sleep yet, is seen the next time
        while os.fstat(stream.fileno()).st_size:
            assert time.monotonic() < deadline
            assert os.pread(stream.fileno(), mmap.PAGESIZE, 0) == content
    with node.open("rb"):
        assert node.stat().st_size == len(content)
    assert node.stat().st_size == 0


@pytest.mark.parametrize("length", [1000, mmap.PAGESIZE + 1, 2 * mmap.PAGESIZE, 1 << 17])
def test_a_read_that_no_splice_makes_ends_the_size_at_once(length: int, shown: Emulator) -> None:
    """It is no whole page, or goes beyond the last: nobody's system call need be looked at."""
    node = shown.policies / "Signed" / "policy"
    with node.open("rb", buffering=0) as stream:
        assert os.fstat(stream.fileno()).st_size == len(text("Signed"))
        assert stream.read(length) == text("Signed")
        assert os.fstat(stream.fileno()).st_size == 0


@pytest.mark.parametrize("node", ["new_policy", "enforce", "policies/Signed/delete"])
def test_no_size_shows_to_who_may_write(node: str, shown: Emulator) -> None:
    fd = os.open(shown.ipe / node, os.O_RDWR)
    try:
        assert os.fstat(fd).st_size == 0
        assert (shown.ipe / node).stat().st_size == 0
        assert fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) == bytes(4)
    finally:
        os.close(fd)


def test_reads_at_any_offset_and_of_any_length(shown: Emulator) -> None:
    content = text("Signed")
    fd = os.open(shown.policies / "Signed" / "policy", os.O_RDONLY)
    try:
        for offset in (0, 1, 17, len(content) - 1, len(content), len(content) + 1000):
            for length in (1, 5, 4096, 1 << 20):
                assert os.pread(fd, length, offset) == content[offset : offset + length]
    finally:
        os.close(fd)


def test_stat_does_not_disturb_who_reads_by_sendfile(shown: Emulator, tmp_path: Path) -> None:
    """A stat between open and sendfile must not make the kernel think that the node is empty."""
    node = shown.policies / "Signed" / "policy"
    content = text("Signed")
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            os.stat(node)  # noqa: PTH116 - one system call

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(60):
            copy = tmp_path / "copy"
            shutil.copyfile(node, copy)
            assert copy.read_bytes() == content
            assert subprocess.run(["busybox", "cat", node], stdout=subprocess.PIPE, check=True).stdout == content
    finally:
        over.set()
        looker.join()


def test_many_read_at_once(shown: Emulator) -> None:
    node = shown.policies / "Signed" / "policy"
    readers = [subprocess.Popen(["busybox", "cat", node], stdout=subprocess.PIPE) for _ in range(20)]
    assert [reader.communicate(timeout=30)[0] for reader in readers] == [text("Signed")] * 20
