"""run: options, exit statuses, and what the command finds."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT, PROGRAM, Run, spawn
from tests.vectors import BOOT_POLICY

pytestmark = [pytest.mark.needs("fuse", "user-namespaces"), pytest.mark.timeout(60)]

NODE = "/sys/kernel/security/ipe"
DENYING = ("--boot-policy", BOOT_POLICY)


def test_the_command_finds_securityfs_and_its_own_status_comes_back() -> None:
    done = spawn("run", *DENYING, "--cmdline", "ipe.enforce=0", "--", "sh", "-c", f"cat {NODE}/enforce; exit 42")
    assert (done.returncode, done.stdout) == (42, b"0"), done.stderr


def test_what_is_denied_is_summarised_and_can_fail_the_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    allowed = ("--boot-verified", "/usr")
    run = ("run", *DENYING, *allowed)
    command = ("--", "/bin/sh", "-c", f"{program}; true")
    done = spawn(*run, *command)
    assert done.returncode == 0, done.stderr
    assert b"denied: 1" in done.stderr
    assert os.fsencode(program) in done.stderr
    assert spawn(*run, "--fail-on-deny", *command).returncode == 1
    assert spawn(*run, "--fail-on-deny", "--", "/bin/true").returncode == 0


def test_a_command_that_the_policy_denies_is_126() -> None:
    done = spawn("run", *DENYING, "--", "true")
    assert done.returncode == 126, done.stderr
    assert b"Permission denied" in done.stderr


def test_a_command_that_is_not_there_is_127() -> None:
    assert spawn("run", "--", "/nonexistent").returncode == 127


def test_what_stands_behind_the_dashes_is_the_commands() -> None:
    done = spawn("run", "--", "printf", "%s ", "--kernel", "--", "x")
    assert (done.returncode, done.stdout) == (0, b"--kernel -- x ")


def test_the_dashes_may_be_left_out() -> None:
    done = spawn("run", "--kernel", "linux-7.3", "printf", "%s", "--help")
    assert (done.returncode, done.stdout) == (0, b"--help")
    assert b"kernel profile linux-7.3" in done.stderr


def test_audit_log_to_stderr() -> None:
    done = spawn("run", *DENYING, "--audit-log", "-", "--", "true")
    assert b"type=IPE_ACCESS msg=audit(" in done.stderr


def test_debug_says_how_the_sandbox_is_made() -> None:
    assert b"mount the emulated securityfs on /sys/kernel/security" in spawn("run", "--debug", "--", "true").stderr


@pytest.mark.parametrize("options", [(), ("--",), ("--boot-policy", "/nonexistent", "--", "true")])
def test_bad_usage_starts_nothing(options: tuple[str, ...]) -> None:
    done = spawn("run", *options)
    assert done.returncode == 2
    assert b"ipe-emu: error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_bad_usage_is_told_from_the_commands_own_words(ipe_emu: Run) -> None:
    assert ipe_emu("run", "--bogus", "--", "true").status == 2


def test_a_signal_that_ends_the_command_is_told_as_a_shell_does() -> None:
    assert spawn("run", "--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


def test_sigterm_to_the_supervisor_ends_the_tree() -> None:
    process = subprocess.Popen(
        [*PROGRAM, "run", "--", "sh", "-c", "echo ready; exec sleep 1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    # The pipe ends when the last process that holds it does.
    assert process.stdout.read() == b""
    process.stdout.close()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An emulator, mounted for whoever asks it."""
    directory = tmp_path / "mounted"
    directory.mkdir()
    done = spawn("mount", directory, "--kernel", "linux-7.3", *DENYING, "--boot-verified", "/usr")
    assert done.returncode == 0, done.stderr
    yield directory
    spawn("umount", directory)


def test_attached_to_a_mounted_emulator_that_one_judges(mounted: Path) -> None:
    script = f"cat {NODE}/policies/AllowInitramfs/active; echo 0 >{NODE}/enforce"
    done = spawn("run", "--attach", mounted, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, b"1"), done.stderr
    assert b"kernel profile linux-7.3" in done.stderr
    assert (mounted / "ipe" / "enforce").read_text() == "0"


@pytest.mark.parametrize(
    "option",
    [("--kernel", "op-policy"), ("--boot-policy", BOOT_POLICY), ("--boot-verified", "/usr"), ("--cmdline", "x")],
)
def test_attached_it_takes_no_description_of_another_machine(mounted: Path, option: tuple[str, str | Path]) -> None:
    done = spawn("run", "--attach", mounted, *option, "--", "true")
    assert done.returncode == 2
    assert f"{option[0]} and --attach".encode() in done.stderr


def test_attached_to_nothing(tmp_path: Path) -> None:
    done = spawn("run", "--attach", tmp_path, "--", "true")
    assert done.returncode == 2
    assert b"no emulator is mounted there" in done.stderr


@pytest.mark.parametrize(
    ("name", "fault"), [("missing", "No such file or directory"), ("file", "not a directory"), ("file/x", "Not a dir")]
)
def test_what_stands_for_a_file_system_with_fs_verity_is_a_directory(tmp_path: Path, name: str, fault: str) -> None:
    (tmp_path / "file").touch()
    done = spawn("run", "--sealable", str(tmp_path / name), "--", "true")
    assert done.returncode == 2
    assert f"--sealable {tmp_path}/{name}: {fault}" in done.stderr.decode()


def test_a_file_system_that_no_kernel_seals_files_on_is_named() -> None:
    done = spawn("run", "--sealable", "/dev/shm", "--", "true")
    assert done.returncode == 0, done.stderr
    assert b"--sealable /dev/shm: no kernel has fs-verity on tmpfs" in done.stderr


def test_a_mounted_emulator_seals_nothing(tmp_path: Path) -> None:
    done = spawn("run", "--attach", str(tmp_path), "--sealable", str(tmp_path), "--", "true")
    assert done.returncode == 2
    assert b"--sealable and --attach: the emulator that is mounted there has its own" in done.stderr
