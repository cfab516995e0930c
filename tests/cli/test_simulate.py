"""policy simulate: what it prints, its exit statuses, and options that contradict each other."""

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT, PROGRAM, Run

POLICY = """policy_name=Volume policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE dmverity_signature=TRUE action=ALLOW
"""
HASH = "sha256:" + "00" * 32


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "volume.pol"
    path.write_text(POLICY)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, content in {"script": "#!/interpreter\n", "interpreter": "no program", "data": "0"}.items():
        (tree / name).write_text(content)
        (tree / name).chmod(0o755 if name == "script" else 0o644)
    return tree


def test_what_is_denied_is_named_with_its_rule_and_fails(ipe_emu: Run, policy: Path, tree: Path) -> None:
    done = ipe_emu("policy", "simulate", "--policy", policy, tree)
    assert done.status == 1
    assert done.out.splitlines() == [
        "/script: denied (EACCES at BPRM_CHECK): DEFAULT action=DENY",
        "1 script: 1 denied",
        "  1 by DEFAULT action=DENY",
    ]
    assert "kernel profile op-policy" in done.err


def test_json_says_all_of_it(ipe_emu: Run, policy: Path, tree: Path) -> None:
    (tree / "new\nline").write_text("text")
    (tree / "new\nline").chmod(0o755)
    volume = ("--roothash", HASH, "--signed")
    done = ipe_emu("policy", "simulate", "--json", "--kernel", "linux-7.3", "--policy", policy, *volume, tree)
    assert done.status == 1
    report = json.loads(done.out)
    assert (report["kernel"], report["policy"], report["tree"]) == ("linux-7.3", "Volume", str(tree))
    asked = {"hook": "BPRM_CHECK", "path": "/new\\nline", "action": "ALLOW"}
    known = [f"dm-verity {HASH} (signed)"]
    assert report["files"] == [
        {
            "path": "/new\\nline", "kind": "other", "outcome": "no program", "answer": "ENOEXEC",
            "reason": "neither a script nor a program of this machine", "decided_by": None, "asked": [asked],
            "known": known,
        },
        {
            "path": "/script", "kind": "script", "outcome": "fails", "answer": "EACCES",
            "reason": "its interpreter /interpreter is not executable, or no regular file", "decided_by": None,
            "asked": [{**asked, "path": "/script"}], "known": known,
        },
    ]  # fmt: skip
    assert report["summary"] == {
        "kinds": {"other": {"no program": 1}, "script": {"fails": 1}}, "failed": 1, "not_judged": 0, "decided_by": [],
    }  # fmt: skip


def test_what_runs_is_printed_if_wanted(ipe_emu: Run, policy: Path, tree: Path) -> None:
    (tree / "script").unlink()
    (tree / "interpreter").chmod(0o755)
    run = ("policy", "simulate", "--policy", policy, "--roothash", HASH, "--signed", tree)
    done = ipe_emu(*run)
    assert (done.status, done.out) == (0, "1 other file: 1 no program\n")
    shown = ipe_emu(*run, "--all").out
    assert shown.startswith("/interpreter: no program (ENOEXEC): neither a script nor a program of this machine\n")


@pytest.mark.parametrize("content", [None, "#!relative\n"], ids=["nothing there", "a relative interpreter"])
def test_what_cannot_be_judged_is_4(ipe_emu: Run, policy: Path, tree: Path, content: str | None) -> None:
    if content is None:
        (tree / "script").unlink()
    else:
        (tree / "script").write_text(content)
    assert ipe_emu("policy", "simulate", "--policy", policy, "--roothash", HASH, "--signed", tree).status == 4


@pytest.mark.parametrize("to", ["a pipe", "the terminal"])
def test_a_bar_on_a_terminal_and_the_result_where_it_belongs(policy: Path, tree: Path, to: str) -> None:
    terminal, slave = pty.openpty()
    try:
        with subprocess.Popen(
            [*PROGRAM, "policy", "simulate", "--policy", policy, tree],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if to == "a pipe" else slave, stderr=slave,
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "200"},
        ) as process:  # fmt: skip
            os.close(slave)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
                while some := os.read(terminal, 65536):
                    shown += some
            out = b"" if process.stdout is None else process.stdout.read()
    finally:
        os.close(terminal)
    assert process.returncode == 1
    assert b"judging" in shown
    denial = b"/script: denied (EACCES at BPRM_CHECK): DEFAULT action=DENY"
    assert (denial in shown, denial in out) == (to != "a pipe", to == "a pipe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--signed",), "--signed: says that a root hash is signed, and there is none"),
        (("--fsverity-signed",), "--fsverity-signed: says that files are sealed with a signature"),
        (("--roothash", "SHA256:00"), "--roothash is 'SHA256:00'; it is ALGORITHM:HEX, in lower case"),
        (("--roothash", HASH, "--boot-verified", "TREE"), "is declared twice"),
    ],
)
def test_options_that_contradict(
    ipe_emu: Run, policy: Path, tree: Path, options: tuple[str, ...], message: str
) -> None:
    given = [str(tree) if word == "TREE" else word for word in options]
    done = ipe_emu("policy", "simulate", "--policy", policy, *given, tree)
    assert done.status == 2
    assert message in done.err


@pytest.mark.parametrize("name", ["nothing", "data"])
def test_a_tree_that_is_none(ipe_emu: Run, policy: Path, tree: Path, name: str) -> None:
    done = ipe_emu("policy", "simulate", "--policy", policy, tree / name)
    assert done.status == 2
    assert name in done.err
