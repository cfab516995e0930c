"""Where records go to something that may have no reader any more."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipe_emu.audit import AuditRecord, RecordType
from ipe_emu.cli.audit_log import Courier, open_audit_log
from tests.securityfs.emulator import mounted

pytestmark = pytest.mark.timeout(60)


class Reader:
    """Takes lines when it is let."""

    def __init__(self) -> None:
        self.reads = threading.Event()
        self.lines: list[bytes] = []

    def __call__(self, line: bytes) -> None:
        self.reads.wait()
        self.lines.append(line)


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.reads.set()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # nothing announces it


def test_a_line_is_out_when_the_call_returns(reader: Reader) -> None:
    reader.reads.set()
    courier = Courier(reader)
    for number in range(100):
        courier(b"%d\n" % number)
        assert reader.lines[-1] == b"%d\n" % number


def test_nobody_waits_twice_for_a_reader_that_stopped(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    courier = Courier(reader, patience=0.2, backlog=3)
    began = time.monotonic()
    for number in range(10):
        courier(b"%d" % number)
    assert time.monotonic() - began < 5  # ten times the patience would be 2, but for a machine that is busy
    assert courier.lost in (6, 7)  # one is in the writer's hands
    said = ""

    def has_said(what: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return what in said

    eventually(lambda: has_said("nobody reads the audit log; records are kept for a while, and then lost"))
    reader.reads.set()
    eventually(lambda: has_said(f"{courier.lost} audit records were lost"))
    assert reader.lines == [b"%d" % number for number in range(10 - courier.lost)]
    courier(b"next")  # and then it is as before
    assert reader.lines[-1] == b"next"


def test_what_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    Courier(broken)(b"record\n")
    assert "audit record not written (Broken pipe): record" in capsys.readouterr().err


def test_pipes_sockets_and_stderr_have_a_courier_and_files_have_none(tmp_path: Path) -> None:
    """Stopped readers of each of them; what a file is given is there at once."""
    code = (
        "import sys; from ipe_emu.cli import audit_log; from ipe_emu.audit import AuditRecord, RecordType\n"
        "audit_log.Courier.__init__.__kwdefaults__['patience'] = 0.1\n"
        "log = audit_log.open_audit_log(sys.argv[1])\n"
        "for _ in range(3000): log(AuditRecord(RecordType.MAC_STATUS, b'x' * 500))\n"
        "print('done', flush=True)\n"
    )
    socket_path = tmp_path / "socket"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(socket_path))
        server.listen()
        try:
            for target in (fifo, socket_path, "-"):
                with subprocess.Popen(
                    [sys.executable, "-c", code, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE
                ) as process:
                    assert process.stdout is not None
                    assert process.stdout.read() == b"done\n", target
                    process.kill()
        finally:
            os.close(held)
    file = tmp_path / "file"
    log = open_audit_log(str(file))
    before = threading.active_count()
    log(AuditRecord(RecordType.MAC_STATUS, b"to a file"))
    assert b"to a file" in file.read_bytes()
    assert threading.active_count() == before


@pytest.mark.needs("fuse", "root")
def test_a_mount_goes_on_without_its_audit_log_s_reader(tmp_path: Path) -> None:
    """Its records come when the reader does."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        with mounted(tmp_path / "m", "--audit-log", fifo) as emulator:
            enforce = emulator.ipe / "enforce"
            began = time.monotonic()
            for number in range(60):
                enforce.write_bytes(b"%d" % (number % 2))
            assert enforce.read_bytes() == b"1"
            assert time.monotonic() - began < 30
            assert os.read(reader, 100).startswith(b"type=MAC_STATUS")
    finally:
        os.close(reader)
