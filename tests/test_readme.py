"""The README: what it shows works as typed in bash, and the options and targets that it names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu import cli
from ipe_emu.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MARK = "@@@ next @@@"


def transcript() -> list[tuple[str, list[str]]]:
    """Every command of the transcripts, in order, with the lines that it is shown to print."""
    commands: list[tuple[str, list[str]]] = []
    for block in re.findall(r"<!-- transcript.*?```console\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            elif line.startswith("> "):
                command, shown = commands[-1]
                commands[-1] = (f"{command}\n{line[2:]}", shown)
            else:
                commands[-1][1].append(line)
    return commands


@pytest.mark.needs("fuse", "user-namespaces")
@pytest.mark.timeout(120)
def test_the_transcripts_work_as_typed(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ipe-emu").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}:{ROOT}/fs exec {sys.executable} -m ipe_emu "$@"\n')
    (programs / "ipe-emu").chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    commands = transcript()
    assert len(commands) > 10
    script = "".join(f"{command}\necho '{MARK}'\n" for command, _ in commands)
    environment = dict(os.environ) | {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "LC_ALL": "C"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=home, env=environment, text=True, timeout=100, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed = [
        [line for line in part.splitlines() if not line.startswith("ipe-emu: ")]
        for part in done.stdout.split(f"{MARK}\n")[:-1]
    ]
    for (command, shown), lines in zip(commands, printed, strict=True):
        assert len(lines) == len(shown), f"$ {command}\n{lines}"
        for line, pattern in zip(lines, shown, strict=True):
            assert re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), line), f"$ {command}\n{line}"


def test_every_option_and_command_it_names_exists() -> None:
    helps = {name: cli.build_parser(name).format_help() for name in COMMANDS}
    known = set()
    waiting = [cli.build_parser()]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            known |= set(action.option_strings)
            if isinstance(action.choices, dict):
                waiting += action.choices.values()
    code = re.findall(r"`([^`\n]+)`", README)
    named = {option for words in code for option in re.findall(r"--[a-z][a-z-]+", words)}
    assert named - known == set()
    for name in re.findall(r"`ipe-emu (\w+)", README):
        assert name in helps, name
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", README)) <= set(targets)
