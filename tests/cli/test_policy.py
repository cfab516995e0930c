"""policy check, show and explain on texts: what is printed, where faults are placed, and the exit statuses."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, spawn

GOOD = "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
BAD = "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\nop=KERNEL_MODULE boot_verified=TRUE action=ALLOW\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.pol"
    file.write_text(GOOD)
    return file


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.pol"
    file.write_text(BAD)
    return file


def test_check_says_what_it_is(ipe_emu: Run, good: Path) -> None:
    result = ipe_emu("policy", "check", good)
    assert result.status == 0
    assert f"{good}: ok: a 1.0.0, 1 rule; not signed" in result.out
    assert result.err.startswith("ipe-emu: kernel profile op-policy (")


def test_check_places_the_fault_and_suggests(ipe_emu: Run, good: Path, bad: Path) -> None:
    result = ipe_emu("policy", "check", good, bad)
    assert result.status == 2
    assert f"{good}: ok" in result.out  # one bad file does not hide the others
    assert f"{bad}:3:4: error: unknown operation `KERNEL_MODULE` (the kernel answers EBADMSG)" in result.out
    assert "KMODULE" in result.out.splitlines()[-1]


def test_check_as_json_names_the_profile(ipe_emu: Run, bad: Path) -> None:
    result = ipe_emu("policy", "check", "--json", "--kernel", "linux-6.12", bad)
    report = json.loads(result.out)
    assert report["kernel"] == "linux-6.12"
    (file,) = report["files"]
    assert (file["ok"], file["errno"], file["line"], file["column"]) == (False, "EBADMSG", 3, 4)


def test_check_prints_what_is_doubtful(ipe_emu: Run, tmp_path: Path) -> None:
    file = tmp_path / "allow.pol"
    file.write_text("policy_name=a policy_version=1.0.0\nDEFAULT action=ALLOW\n")
    result = ipe_emu("policy", "check", file)
    assert result.status == 0
    assert f"{file}:" in result.out
    assert ": warning: " in result.out


@pytest.mark.parametrize("name", ["..", "x/y", "n" * 256])
def test_check_refuses_a_name_that_no_directory_can_have(ipe_emu: Run, tmp_path: Path, name: str) -> None:
    file = tmp_path / "named.pol"
    file.write_text(f"policy_name={name} policy_version=1.0.0\nDEFAULT action=DENY\n")
    result = ipe_emu("policy", "check", file)
    assert result.status == 2
    assert ("ENAMETOOLONG" if len(name) > 255 else "EACCES") in result.out


def test_check_reads_stdin() -> None:
    done = spawn("policy", "check", "-", input=GOOD.encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"<stdin>: ok: a 1.0.0")


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.symlink_to("/dev/zero"), "longer than 4194303 bytes"),
        (lambda p: p.write_bytes(b""), "EBADMSG"),
        (lambda p: p.write_bytes(b"\xff\xfe\0\0"), "EBADMSG"),
        (lambda p: p.write_bytes(b"\n" * 100), "EBADMSG"),
    ],
    ids=["missing", "directory", "endless", "empty", "binary", "only newlines"],
)
def test_check_of_what_is_no_policy(ipe_emu: Run, tmp_path: Path, arrange: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "x.pol"
    arrange(path)
    result = ipe_emu("policy", "check", path)
    assert result.status == 2
    assert said in result.out
    assert "Traceback" not in result.err


def test_a_hostile_file_name_cannot_break_the_line(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a\nb\xff\x1b[2J.pol"
    Path(os.fsdecode(path)).write_text(BAD)
    done = spawn(b"policy", b"check", path)
    assert done.returncode == 2
    assert b"a\\nb\\xff\\x1b[2J.pol:3:4: error" in done.stdout
    assert b"\x1b" not in done.stdout


def test_show_prints_what_parses_to_the_same(ipe_emu: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.pol"
    file.write_text("# what\n\npolicy_name=a   policy_version=+1.0.0 \r\nDEFAULT action=DENY # no\n")
    result = ipe_emu("policy", "show", file)
    assert result.status == 0
    assert result.out == "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\n"


def test_show_as_json(ipe_emu: Run, good: Path) -> None:
    shown = json.loads(ipe_emu("policy", "show", "--json", good).out)
    assert shown["kernel"] == "op-policy"
    assert shown["rules"] == [
        {"line": 3, "operation": "EXECUTE", "properties": ["boot_verified=TRUE"], "action": "ALLOW"}
    ]


def test_show_of_a_bad_policy_says_where(ipe_emu: Run, bad: Path) -> None:
    result = ipe_emu("policy", "show", bad)
    assert (result.status, result.out) == (2, "")
    assert f"error: {bad}:3:4: " in result.err
    assert "(the kernel answers EBADMSG)" in result.err


def test_explain_names_the_rule_or_the_property_that_failed(ipe_emu: Run, good: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.touch()
    ask = ("policy", "explain", "--policy", good, "--op", "EXECUTE", program)
    allowed = ipe_emu(*ask, "--boot-verified", tmp_path)
    assert allowed.status == 0
    assert "line 3: op=EXECUTE boot_verified=TRUE action=ALLOW: matches" in allowed.out
    denied = ipe_emu(*ask)
    assert denied.status == 1
    assert "not boot_verified=TRUE, because" in denied.out
    assert denied.out.splitlines()[-1] == "DENY"


def test_explain_as_json_knows_declared_facts(ipe_emu: Run, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "app").touch()
    facts = tmp_path / "facts.toml"
    facts.write_text(f'[[file]]\npath = "{volume}"\ndmverity = {{ roothash = "sha256:{"ab" * 32}", signed = false }}\n')
    policy = tmp_path / "p.pol"
    policy.write_text(
        "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\n"
        f"op=EXECUTE dmverity_roothash=sha256:{'ab' * 32} action=ALLOW\n"
    )
    result = ipe_emu(
        "policy", "explain", "--json", "--policy", policy, "--op", "EXECUTE", "--integrity", facts, volume / "app"
    )
    answer = json.loads(result.out)
    assert (result.status, answer["action"], answer["decided_by"]) == (0, "ALLOW", "rule")
    assert answer["known"] == [f"dm-verity sha256:{'ab' * 32}"]


def test_explain_refuses_a_declared_path_that_is_not_there(ipe_emu: Run, good: Path, tmp_path: Path) -> None:
    result = ipe_emu(
        "policy", "explain", "--policy", good, "--op", "EXECUTE", "--boot-verified", tmp_path / "nothing", good
    )
    assert result.status == 2
    assert "nothing: No such file" in result.err
