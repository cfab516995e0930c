"""mount, umount, status, decide and audit, each as a process of its own, on a real mount."""

import json
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT, PROGRAM, spawn
from tests.vectors import BOOT_POLICY, KEYS

pytestmark = [pytest.mark.needs("fuse"), pytest.mark.timeout(60)]

Mount = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "securityfs"
    directory.mkdir()
    return directory


@pytest.fixture
def mount(directory: Path) -> Iterator[Mount]:
    """Mount on ``directory`` with some options; taken down at the end."""

    def mount(*options: str | Path) -> "subprocess.CompletedProcess[bytes]":
        return spawn("mount", directory, *options)

    yield mount
    spawn("umount", directory)


BOOT = ("--boot-policy", BOOT_POLICY, "--builtin-keys", KEYS / "builtin-trusted.pem")


def test_a_bare_mount_says_what_is_missing_and_mounts(mount: Mount, directory: Path) -> None:
    done = mount()
    assert done.returncode == 0, done.stderr
    for word in (
        b"kernel profile op-policy",
        b"no boot policy",
        b"--boot-policy",
        b"no trusted keys",
        b"--builtin-keys",
    ):
        assert word in done.stderr
    assert (directory / "ipe" / "enforce").read_text() == "1"
    assert list((directory / "ipe" / "policies").iterdir()) == []


def test_boot_policy_and_cmdline(mount: Mount, directory: Path) -> None:
    done = mount(*BOOT, "--cmdline", "quiet ipe.enforce=0 ipe.success_audit=1")
    assert done.returncode == 0, done.stderr
    assert b"no boot policy" not in done.stderr
    assert (directory / "ipe" / "enforce").read_text() == "0"
    assert (directory / "ipe" / "success_audit").read_text() == "1"
    assert (directory / "ipe" / "policies" / "AllowInitramfs" / "active").read_text() == "1"


def test_a_parameter_that_is_no_boolean_is_said_and_ignored(mount: Mount, directory: Path) -> None:
    done = mount("--cmdline", "ipe.enforce=perhaps")
    assert b"ipe.enforce=perhaps: no boolean" in done.stderr
    assert (directory / "ipe" / "enforce").read_text() == "1"


def test_umount_ends_it_and_a_second_one_says_so(mount: Mount, directory: Path) -> None:
    mount()
    assert spawn("umount", directory).returncode == 0
    assert list(directory.iterdir()) == []
    again = spawn("umount", directory)
    assert again.returncode == 2
    assert b"no emulator is mounted there" in again.stderr


def test_status_tells_what_is_held(mount: Mount, directory: Path) -> None:
    mount("--kernel", "linux-7.3", *BOOT)
    shown = spawn("status", directory)
    assert b"kernel profile linux-7.3" in shown.stderr
    assert b"active  AllowInitramfs 0.0.0, 4 rule(s), not signed" in shown.stdout
    status = json.loads(spawn("status", "--json", directory).stdout)
    assert status["kernel"] == "linux-7.3"
    assert status["active"] == "AllowInitramfs"


@pytest.mark.parametrize(
    ("operation", "verified", "status"),
    [("EXECUTE", True, 0), ("EXECUTE", False, 1), ("FIRMWARE", True, 0), ("X509_CERT", True, 1)],
)
def test_decide(mount: Mount, directory: Path, tmp_path: Path, operation: str, verified: bool, status: int) -> None:
    file = tmp_path / "file"
    file.touch()
    mount(*BOOT, *(["--boot-verified", file] if verified else []))
    asked = spawn("decide", "--op", operation, "--mount", directory, file)
    assert asked.returncode == status, asked.stderr
    assert asked.stdout.startswith(b"denied (EACCES)" if status else b"allowed")
    assert (b"type=IPE_ACCESS ipe_op=" + operation.encode() in asked.stdout) is bool(status)
    answer = json.loads(spawn("decide", "--json", "--op", operation, "--mount", directory, file).stdout)
    assert (answer["kernel"], answer["allowed"]) == ("op-policy", status == 0)


def test_decide_without_a_file(mount: Mount, directory: Path) -> None:
    mount(*BOOT)
    asked = spawn("decide", "--op", "KMODULE", "--hook", "KERNEL_LOAD", "--mount", directory)
    assert asked.returncode == 1
    assert b"path=? dev=? ino=?" in asked.stdout


def test_decide_about_what_is_not_there(mount: Mount, directory: Path, tmp_path: Path) -> None:
    mount(*BOOT)
    asked = spawn("decide", "--op", "EXECUTE", "--mount", directory, tmp_path / "nothing")
    assert asked.returncode == 2
    assert b"No such file" in asked.stderr


def test_audit_follow_prints_records_as_they_come(mount: Mount, directory: Path) -> None:
    mount(*BOOT)
    follow = subprocess.Popen(
        [*PROGRAM, "audit", "--follow", directory], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert follow.stdout is not None
    assert follow.stderr is not None
    try:
        follow.stderr.readline()
        follow.stderr.readline()  # the second line says where: it is connected
        enforce = directory / "ipe" / "enforce"
        value = "0"
        # Connected is not yet following: write until the first record is there.
        while not select.select([follow.stdout], [], [], 0.05)[0]:
            enforce.write_text(value)
            value = "1" if value == "0" else "0"
        assert follow.stdout.readline().startswith(b"type=MAC_STATUS msg=audit(")
    finally:
        follow.send_signal(signal.SIGINT)
        follow.stdout.close()
        follow.stderr.close()
        follow.wait(timeout=20)


def test_audit_log_to_a_file_is_appended_to(mount: Mount, directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    log.write_text("before\n")
    mount("--audit-log", log, *BOOT)
    (directory / "ipe" / "enforce").write_text("0")
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert [line.split()[0] for line in lines[1:]] == ["type=MAC_STATUS", "type=MAC_STATUS"]


def test_audit_log_to_a_socket(mount: Mount, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(20)
        assert mount("--audit-log", path, *BOOT).returncode == 0
        (directory / "ipe" / "enforce").write_text("0")
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as lines:
            assert lines.readline().startswith(b"type=MAC_STATUS msg=audit(")
        spawn("umount", directory)


def test_a_new_audit_log_is_its_owners_alone(mount: Mount, tmp_path: Path) -> None:
    mount("--audit-log", tmp_path / "audit.log", *BOOT)
    assert stat.S_IMODE((tmp_path / "audit.log").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--audit-log", "-"), b"--foreground"),
        (("--audit-log", "/dev/null/x"), b"--audit-log /dev/null/x: Not a directory"),
        (("--boot-policy", "/dev/null"), b"EBADMSG"),
        (("--boot-policy", "/nonexistent"), b"No such file"),
        (("--builtin-keys", "/nonexistent"), b"No such file"),
        (("--integrity", "/nonexistent"), b"No such file"),
        (("--boot-verified", "/nonexistent"), b"No such file"),
        (("--kernel", "linux-6.12", "--dm-verity-keys", KEYS / "trusted.pem"), b"no such keyring"),
        (("--kernel", "linux-1.0"), b"invalid choice"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, tuple) else "",
)
def test_bad_options_are_messages_and_nothing_is_mounted(
    mount: Mount, directory: Path, options: tuple[str, ...], said: bytes
) -> None:
    done = mount(*options)
    assert done.returncode == 2
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert list(directory.iterdir()) == []


def test_mounting_where_nothing_can_be_mounted(tmp_path: Path) -> None:
    for target in (tmp_path / "missing", BOOT_POLICY):
        done = spawn("mount", target)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


def test_commands_without_any_emulator_say_so(directory: Path) -> None:
    for command in (["status"], ["audit", "--follow"], ["decide", "--op", "EXECUTE", "--mount"]):
        done = spawn(*command, directory)
        assert done.returncode == 2
        assert b"no emulator is mounted there" in done.stderr
