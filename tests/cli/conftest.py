"""Running the program: in this process where that is enough, as a process of its own where start-up counts."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from attrs import frozen

from ipe_emu.cli import main

ROOT = Path(__file__).parent.parent.parent
PROGRAM = (sys.executable, "-m", "ipe_emu")
#: What a process of its own finds the program with, wherever it is started.
ENVIRONMENT = dict(os.environ) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}


@frozen
class Result:
    """What a run of the program gave."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def ipe_emu(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        except SystemExit as exit_:  # argparse's way out
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def spawn(*arguments: str | bytes | Path, **options: object) -> "subprocess.CompletedProcess[bytes]":
    """Run the program as a process of its own."""
    command: Sequence[str | bytes | Path] = [*PROGRAM, *arguments]
    return subprocess.run(  # type: ignore[call-overload,no-any-return]  # options of any type
        command, capture_output=True, timeout=60, check=False, env=ENVIRONMENT, **options
    )
