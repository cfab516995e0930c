"""`ipe-emu run` where the machine differs, and under an emulator that is mounted already."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.exec_hook.running import LIMIT, Runner, runner
from tests.overlay_root import on_overlay
from tests.rootless import ROOT, as_plain_user

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}", "PYTHONDONTWRITEBYTECODE": "1"}
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def shell_on_overlay(place: Path, script: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = Runner(place, plain_user=False).command_line("run", *options, "--", "sh", "-c", script)
    return subprocess.run(
        on_overlay(place, command),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env=ENVIRONMENT,
        cwd=place,
    )


# -- root, where the root directory's files cannot be given to other ids ----------------------------------------------


@pytest.mark.needs("root")
def test_root_on_an_overlay_is_told_that_the_command_runs_as_root(tmp_path: Path) -> None:
    done = shell_on_overlay(tmp_path, "cat /sys/kernel/security/ipe/enforce /proc/self/uid_map; exit 6")
    assert done.stdout.split() == ["1", "0", "0", "4294967295"] or done.stdout.split() == ["10", "0", "4294967295"]
    assert done.returncode == 6
    assert "runs as this machine's root" in done.stderr


@pytest.mark.needs("root")
def test_the_shield_keeps_devices_and_controls_from_it(tmp_path: Path) -> None:
    before = CORE_PATTERN.read_text()
    try:
        done = shell_on_overlay(
            tmp_path,
            f"echo x >{CORE_PATTERN} && echo written; mount -o remount,bind,rw /proc/sys && echo remounted;"
            "umount /proc/sys && echo unmounted; umount /proc && echo unmounted;"
            f"echo x >{CORE_PATTERN} && echo written;"
            "mount -o remount,bind,rw /sys && echo remounted; umount /dev && echo unmounted;"
            "mknod node b 7 0; true <node && echo opened; mknod null c 1 3; true <null && echo opened;"
            "for d in /dev/*; do [ -b $d ] && echo disk $d; done; [ -e /dev/mem ] && echo memory;"
            "true </dev/null && echo end",
        )
        assert done.stdout == "end\n"
        assert CORE_PATTERN.read_text() == before
    finally:
        CORE_PATTERN.write_text(before)


# -- a machine without the directory ----------------------------------------------------------------------------------


@pytest.mark.needs("root")
@pytest.mark.parametrize("below", ["/sys", "/sys/kernel"])
def test_where_the_machine_has_no_securityfs_directory_one_is_made(tmp_path: Path, below: str) -> None:
    emu = runner(tmp_path, plain_user=False)
    inner = " ".join(emu.command_line("run", "--", "sh", "-c", "'cat /sys/kernel/security/ipe/enforce; ls $0'", below))
    script = f"mount -t tmpfs none {below} && mkdir {below}/other && ln -s other {below}/link && exec {inner}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env=ENVIRONMENT,
    )
    names = {"link", "other", "kernel" if below == "/sys" else "security"}
    assert set(done.stdout.removeprefix("1").split()) == names
    assert done.returncode == 0


@pytest.mark.needs("root")
def test_a_machine_that_cannot_emulate_it_is_told_so_and_nothing_starts(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=True, fuse=False)
    done = emu.run("run", "--", "touch", str(tmp_path / "started"))
    assert "/dev/fuse: Permission denied" in done.stderr
    assert done.returncode == 77
    assert not (tmp_path / "started").exists()


@pytest.mark.needs("root")
def test_without_user_namespaces_nothing_starts(tmp_path: Path) -> None:
    limit = Path("/proc/sys/user/max_user_namespaces")
    emu = runner(tmp_path, plain_user=False)
    command = " ".join(emu.command_line("run", "--", "touch", str(tmp_path / "started")))
    # The limit counts below the user namespace in which it is set.
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", f"echo 0 >{limit} && exec {command}"],
        capture_output=True, text=True, timeout=LIMIT, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 77, done.stderr
    assert "no user namespace can be made here" in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.needs("root")
def test_subordinate_ids_make_chown_and_su_work(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=True, subordinate_ids=True)
    done = emu.shell("touch x; chown 33:44 x; stat -c %u:%g x; setpriv --reuid 33 --regid 44 --clear-groups id -u")
    assert done.stdout.split() == ["33:44", "33"]
    assert "only one user id" not in done.stderr


@pytest.mark.needs("root")
def test_root_of_somebody_s_user_namespace_can_run_too(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=False)
    command = emu.command_line(
        "run", *emu.with_policy(), "--", "sh", "-c", "cat /sys/kernel/security/ipe/enforce; id -u"
    )
    done = subprocess.run(
        ["unshare", "-Ur", *command], capture_output=True, text=True, timeout=LIMIT, check=False, env=ENVIRONMENT
    )
    assert done.stdout == "10\n", done.stderr


# -- under a mounted emulator -----------------------------------------------------------------------------------------

WHO = ("caller", "plain-user") if os.geteuid() == 0 else ("caller",)


@pytest.fixture(params=WHO)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Runner, str]:
    """Whoever mounts an emulator, and a script's beginning and end that mount it and take it down around the rest.

    One process does all: what a plain user of these tests mounts is seen in his mount namespace only.
    """
    emu = runner(tmp_path, plain_user=request.param == "plain-user")
    (tmp_path / "dir").mkdir()
    if emu.plain_user:
        os.chown(tmp_path / "dir", 64321, 64321)
    options = " ".join(emu.with_policy())
    ours = " ".join(Runner(tmp_path, plain_user=False).command_line())
    script = tmp_path / "around"
    script.write_text(
        f"emu='{ours}'\n$emu mount dir {options} 2>mount-log || exit 99\n. ./inner\n$emu umount dir 2>umount-log\n"
    )
    return emu, str(script)


def around(emu: Runner, script: str, inner: str) -> "subprocess.CompletedProcess[str]":
    (emu.place / "inner").write_text(inner)
    command = ["sh", script]
    if emu.plain_user:
        command = as_plain_user(command, emu.place)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, check=False, env=ENVIRONMENT, cwd=emu.place
    )


def test_attached_the_mounted_emulator_decides(mounted: tuple[Runner, str]) -> None:
    emu, script = mounted
    program = emu.place / "busybox"
    program.write_bytes(Path("/bin/busybox").read_bytes())
    program.chmod(0o755)
    (emu.place / "command").write_text(
        f"{program} echo refused; cd /sys/kernel/security/ipe; cat policies/*/name; echo; echo 0 >enforce\n"
        f"{program} echo permitted\nexit 8\n"
    )
    done = around(emu, script, "$emu run --attach dir -- sh ./command; echo $?; cat dir/ipe/enforce\n")
    assert done.stdout.splitlines() == ["Initramfs", "permitted", "8", "0"], done.stderr
    assert "denied: 1" in done.stderr


def test_attached_its_control_socket_is_out_of_reach(mounted: tuple[Runner, str]) -> None:
    emu, script = mounted
    (emu.place / "command").write_text(
        "echo 0 >/sys/kernel/security/ipe/enforce; $emu status dir; echo $?; $emu umount dir; echo $?\n"
    )
    done = around(emu, script, "export emu; $emu run --attach dir -- sh ./command; $emu status dir >status; echo $?\n")
    assert done.stdout.splitlines() == ["2", "2", "0"]
    assert "Initramfs" in (emu.place / "status").read_text()


def test_attached_to_one_that_dies_the_run_is_not_judged(mounted: tuple[Runner, str]) -> None:
    emu, script = mounted
    pid = "$($emu status --json dir 2>/dev/null | sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p')"
    (emu.place / "command").write_text("echo ready >fifo; read word <fifo; busybox true; exit 0\n")
    inner = (
        "mkfifo fifo; $emu run --attach dir -- sh ./command & run=$!; read word <fifo;"
        f"kill -9 {pid}; echo on >fifo; wait $run; echo $?\n"
    )
    done = around(emu, script, inner)
    assert done.stdout.splitlines() == ["125"], done.stderr


def test_there_must_be_one_to_attach_to(tmp_path: Path) -> None:
    done = runner(tmp_path, plain_user=False).run("run", "--attach", str(tmp_path), "--", "true")
    assert done.returncode == 2
    assert "no emulator is mounted there" in done.stderr
