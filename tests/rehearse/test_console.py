"""The terminals that stand for the machine's console, kernel log and sysrq trigger, without a machine."""

import contextlib
import os
import threading
from collections.abc import Iterator

import pytest

from ipe_emu.rehearse.console import Console
from ipe_emu.rehearse.power import Power

LIMIT = 20


@pytest.fixture
def console() -> Iterator[Console]:
    with contextlib.closing(Console(os.geteuid())) as made:
        yield made


def test_lines_of_the_log_arrive_whole(console: Console, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    console.on_log = lines.append
    with console.running():
        os.write(console.kmsg.theirs, b"<6>one\ntw")
        os.write(console.kmsg.theirs, b"o\n\xff\n")
        os.write(console.kmsg.theirs, b"x" * 3000 + b"\n")
        os.write(console.console.theirs, b"to the console\n")
    assert lines[:3] == ["<6>one", "two", "\\xff"]
    assert all(len(line) <= 1024 for line in lines)
    assert "".join(lines[3:]).startswith("x" * 1024)
    assert capfd.readouterr().out == "to the console\n"


def test_the_first_letter_of_a_sysrq_command_counts(console: Console) -> None:
    ended = threading.Event()
    told: list[tuple[str, str]] = []

    def end(how: str, means: str, caller: object) -> None:
        assert caller is None
        told.append((how, means))
        ended.set()

    console.on_sysrq = Power(end).sysrq
    with console.running():
        for command in (b"h\n", b"s\n", b"reboot\n", b"b\n"):
            os.write(console.sysrq.theirs, command)
        assert ended.wait(LIMIT)
    assert told == [("restarted", "sysrq-trigger: b")]
