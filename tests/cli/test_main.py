"""The frame of every command: help, usage, errors as messages, and what an interruption gives."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu import __version__, cli
from ipe_emu.cli import COMMANDS, doctor, run
from ipe_emu.cli.output import escape
from ipe_emu.errors import CannotEmulateError, KernelError, NotJudgedError, UserError
from tests.cli.conftest import ENVIRONMENT, PROGRAM, Run, spawn


def test_version(ipe_emu: Run) -> None:
    assert ipe_emu("--version").out == f"ipe-emu {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(ipe_emu: Run, command: str) -> None:
    inner = re.findall(r"^    (\w+) ", ipe_emu(command, "--help").out, re.MULTILINE)
    texts = [ipe_emu(command, word, "--help").out for word in inner] or [ipe_emu(command, "--help").out]
    assert all(f"examples:\n  ipe-emu {command}" in text or "source <(ipe-emu" in text for text in texts), texts


@pytest.mark.parametrize(
    "arguments", [(), ("bogus",), ("policy",), ("policy", "check"), ("policy", "check", "--x", "y")]
)
def test_bad_usage_is_2(ipe_emu: Run, arguments: tuple[str, ...]) -> None:
    result = ipe_emu(*arguments)
    assert result.status == 2
    assert "usage: ipe-emu" in result.err


@pytest.mark.parametrize(
    ("error", "status", "in_run"),
    [
        (UserError("that was wrong"), 2, 2),
        (KernelError(77, "that was wrong"), 2, 2),
        (FileNotFoundError(2, "that was wrong", b"a\nb"), 2, 2),
        (NotJudgedError("that was wrong"), 4, 125),
        (CannotEmulateError("that was wrong"), 77, 77),
        (KeyboardInterrupt(), 130, 130),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_errors_become_messages(
    ipe_emu: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, in_run: int
) -> None:
    def fail(_args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    monkeypatch.setattr(run, "run", fail)
    for result, expected in ((ipe_emu("doctor"), status), (ipe_emu("run", "--", "true"), in_run)):
        assert result.status == expected
        assert "Traceback" not in result.err
        assert isinstance(error, KeyboardInterrupt) or "that was wrong" in result.err
        assert "a\nb" not in result.err


def test_a_defect_is_called_one_and_is_never_a_pass(ipe_emu: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "run", fail)
    result = ipe_emu("doctor")
    assert result.status == 4
    assert "defect of ipe-emu" in result.err
    assert "ZeroDivisionError" in result.err  # for the report


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    policy = tmp_path / "a.pol"
    rules = "".join(f"op=EXECUTE fsverity_digest=sha256:{n:064x} action=ALLOW\n" for n in range(2000))
    policy.write_text(f"policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\n{rules}")
    process = subprocess.Popen(
        [*PROGRAM, "policy", "show", policy], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    assert b"Traceback" not in complaint
    assert b"error" not in complaint


def test_runs_as_a_module() -> None:
    assert spawn("--version").stdout == f"ipe-emu {__version__}\n".encode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain", "plain"),
        ("schön".encode(), "schön"),
        (b"a\nb\tc", "a\\nb\\tc"),
        (b"\xff\x00", "\\xff\\x00"),
        (b"back\\slash", "back\\\\slash"),
        ("\u2028\x9b".encode(), "\\u2028\\x9b"),
    ],
)
def test_escape(name: bytes, shown: str) -> None:
    assert escape(name) == shown
    assert escape(os.fsdecode(name)) == shown


def test_every_module_of_the_table_is_there() -> None:
    parser = cli.build_parser()
    assert parser.prog == "ipe-emu"
    assert {f"ipe_emu.cli.{name}" for name in COMMANDS} <= set(sys.modules)
