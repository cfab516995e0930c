"""Completion scripts: they load, and propose what the parser knows."""

import subprocess

import pytest

from ipe_emu.cli import COMMANDS
from tests.cli.conftest import Run


def propose(script: str, *words: str) -> list[str]:
    """What bash would propose for the last of ``words``."""
    program = (
        f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ipe_emu\n'
        '[ ${#COMPREPLY[@]} = 0 ] || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", "ipe-emu", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def script(ipe_emu: Run) -> str:
    return ipe_emu("completion", "bash").out


def test_bash_proposes_commands(script: str) -> None:
    assert set(propose(script, "")) >= set(COMMANDS)
    assert propose(script, "pol") == ["policy"]


def test_bash_proposes_inner_commands_and_options(script: str) -> None:
    assert {"check", "show", "sign", "explain"} <= set(propose(script, "policy", ""))
    assert "--builtin-keys" in propose(script, "policy", "check", "--b")
    assert "--boot-policy" in propose(script, "mount", "--")
    assert "--fail-on-deny" in propose(script, "run", "--kernel", "linux-7.3", "--f")


def test_bash_proposes_values_and_leaves_files_to_the_shell(script: str) -> None:
    assert propose(script, "run", "--kernel", "") == ["linux-6.12", "linux-7.3", "op-policy"]
    assert propose(script, "mount", "--boot-policy", "") == []
    assert propose(script, "run", "--", "x", "--") == []
    assert propose(script, "completion", "") == ["-h", "--help", "bash", "zsh", "fish"]


def test_fish_names_every_command_and_option(ipe_emu: Run) -> None:
    lines = ipe_emu("completion", "fish").out.splitlines()
    for name in COMMANDS:
        assert any(f" -a {name} " in line for line in lines), name
    assert any("-l fsverity-keys" in line for line in lines)
