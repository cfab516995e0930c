import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.exec_hook.running import (
    LIMIT,
    Runner,
    children_of,
    descendants_of,
    kill,
    namespaces_of,
    processes_with,
    runner,
    wait_until,
)

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

WHO = ("caller", "plain-user") if os.geteuid() == 0 else ("caller",)


@pytest.fixture(params=WHO)
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain-user")


def foreign_program(place: Path) -> Path:
    """A program that is not below /usr."""
    program = place / "busybox"
    program.write_bytes(Path("/bin/busybox").read_bytes())
    program.chmod(0o755)
    return program


# -- how it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 3, 77, 255])
def test_the_command_s_status_is_returned(emu: Runner, status: int) -> None:
    assert emu.shell(f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
def test_a_death_by_signal_is_returned_as_a_shell_does(emu: Runner, number: signal.Signals) -> None:
    assert emu.shell(f"kill -{number:d} $$").returncode == 128 + number


def test_a_command_that_is_not_there(emu: Runner) -> None:
    done = emu.run("run", "--", "no-such-command")
    assert done.returncode == 127
    assert "no-such-command: No such file or directory" in done.stderr


def test_a_command_that_cannot_be_executed(emu: Runner) -> None:
    done = emu.run("run", "--", "/etc")
    assert done.returncode == 126
    assert "/etc: Permission denied" in done.stderr


def test_a_script_without_an_interpreter_is_given_to_the_shell(emu: Runner) -> None:
    script = emu.place / "script"
    script.write_text('echo "$0 $1"\n')
    script.chmod(0o755)
    assert emu.run("run", "--", str(script), "word").stdout == f"{script} word\n"


def test_the_command_itself_is_judged(emu: Runner) -> None:
    program = foreign_program(emu.place)
    done = emu.run("run", *emu.with_policy(), "--", str(program), "true")
    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def test_denials_are_summarised(emu: Runner) -> None:
    program = foreign_program(emu.place)
    done = emu.shell(f"{program} true; {program} true; exit 4", *emu.with_policy())
    assert done.returncode == 4
    assert re.search(r"denied: 2\n.*\n.* 2 +EXECUTE +BPRM_CHECK +\S*/busybox +DEFAULT action=DENY\n", done.stderr)


def test_denials_can_fail_the_run(emu: Runner) -> None:
    program = foreign_program(emu.place)
    assert emu.shell(f"{program} true; exit 4", *emu.with_policy(), "--fail-on-deny").returncode == 1
    assert emu.shell("exit 4", *emu.with_policy(), "--fail-on-deny").returncode == 4


def test_what_could_not_be_judged_fails_the_run(emu: Runner) -> None:
    done = emu.shell("setarch $(uname -m) -X true; exit 0")
    assert done.returncode == 125
    assert "could not be judged" in done.stderr


def test_nothing_is_said_of_a_run_without_denials(emu: Runner) -> None:
    lines = emu.shell("exit 0", *emu.with_policy()).stderr.splitlines()
    assert not [line for line in lines if "denied" in line or "judged" in line]


def test_what_the_command_leaves_running_ends_with_it(emu: Runner) -> None:
    mark = f"{emu.place}/left"
    assert emu.shell(f"sh -c 'sleep 1000; true' {mark} & exit 0").returncode == 0
    assert processes_with(mark) == []


# -- what it finds --------------------------------------------------------------------------------------------------


def test_the_securityfs_is_where_scripts_look_for_it(emu: Runner) -> None:
    done = emu.shell(
        "cd /sys/kernel/security/ipe; cat enforce; echo 0 >enforce; busybox cat enforce; cat policies/*/name; echo; ls",
        *emu.with_policy(),
    )
    assert done.stdout.split() == ["10Initramfs", "enforce", "new_policy", "policies", "success_audit"]
    assert done.returncode == 0


def test_root_of_a_nested_user_namespace_has_no_power_over_it(emu: Runner) -> None:
    done = emu.shell(
        "unshare -Ur sh -c 'echo 0 >/sys/kernel/security/ipe/enforce'; cat /sys/kernel/security/ipe/enforce"
    )
    assert done.stdout == "1"


def test_it_is_root_and_sees_only_its_own_processes(emu: Runner) -> None:
    done = emu.shell("id -u; echo $$; cd /proc; echo [0-9]*")
    assert done.stdout.splitlines() == ["0", "2", "1 2"]


def test_records_have_the_pids_of_the_machine(emu: Runner) -> None:
    """As the command sees them, and not as a container in it does, nor as we do."""
    records = emu.place / "records"
    program = foreign_program(emu.place)
    done = emu.shell(
        f"unshare -Urpf sh -c 'read line; {program} true' <&- >&- & wait; echo $$; exec {program} true",
        *emu.with_policy(),
        "--audit-log",
        str(records),
    )
    pids = re.findall(r" pid=(\d+) .*busybox", records.read_text())
    assert len(pids) == 2
    assert int(pids[0]) > int(pids[1]) == int(done.stdout)
    assert int(pids[0]) < 100


def test_it_is_in_namespaces_of_its_own(emu: Runner) -> None:
    own = (
        namespaces_of([os.getpid()], "pid") | namespaces_of([os.getpid()], "user") | namespaces_of([os.getpid()], "mnt")
    )
    done = emu.shell("readlink /proc/self/ns/pid /proc/self/ns/user /proc/self/ns/mnt")
    assert len(done.stdout.split()) == 3
    assert not own & set(done.stdout.split())


def test_standard_streams_descriptors_directory_and_environment_are_inherited(emu: Runner) -> None:
    seven = emu.place / "seven"
    command = emu.command_line("run", "--", "sh", "-c", "cat; pwd; echo to-7 >&7; echo to-2 >&2; echo $WORD")
    done = subprocess.run(
        ["sh", "-c", 'exec 7>"$0"; exec "$@"', str(seven), *command],
        input="input\n", capture_output=True, text=True, timeout=LIMIT, check=True, cwd=emu.place,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'fs'}", "WORD": "word"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["input", str(emu.place), "word"]
    assert "to-2" in done.stderr.splitlines()
    assert seven.read_text() == "to-7\n"


def test_standard_streams_can_be_opened_by_name_where_they_are_pipes(emu: Runner) -> None:
    done = emu.shell("echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin; echo x >/dev/null")
    assert done.stdout == "out\n"
    assert "err" in done.stderr.splitlines()


def test_nothing_of_ours_is_inherited(emu: Runner) -> None:
    assert emu.shell("cd /proc/self/fd; echo *").stdout.split() == ["0", "1", "2", "3"]  # 3 is the directory


def signals_in(mask: str) -> int:
    """The standard signals of a mask; 32 and 33 are the C library's own, and what make starts has them ignored."""
    return int(mask, 16) & 0x7FFFFFFF


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_signals_are_as_they_were(emu: Runner, number: signal.Signals) -> None:
    done = emu.run("run", "--", "grep", "^Sig[BI]", "/proc/self/status")
    ignored = {name: signals_in(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    assert ignored == {"SigBlk:": 0, "SigIgn:": 0}


def test_an_ignored_signal_stays_ignored(emu: Runner) -> None:
    command = emu.command_line("run", "--", "grep", "^SigIgn", "/proc/self/status")
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'fs'}"}
    done = subprocess.run(
        ["nohup", *command], capture_output=True, text=True, timeout=LIMIT, env=environment, check=True
    )
    assert signals_in(done.stdout.split()[1]) == 1 << (signal.SIGHUP - 1)


def test_it_works_where_dead_children_are_ignored(emu: Runner) -> None:
    command = emu.command_line("run", "--", "grep", "^SigIgn", "/proc/self/status")
    done = subprocess.run(
        ["env", "--ignore-signal=CHLD", *command], capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'fs'}"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert signals_in(done.stdout.split()[1]) == 1 << (signal.SIGCHLD - 1)


def test_it_works_in_a_directory_that_was_removed(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=False)
    command = emu.command_line("run", "--", "sh", "-c", "ls -A; echo end")
    done = subprocess.run(
        ["sh", "-c", "mkdir gone && cd gone && rmdir ../gone && exec \"$@\"", "sh", *command], cwd=tmp_path,
        capture_output=True, text=True, timeout=LIMIT, check=True,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'fs'}"},
    )  # fmt: skip
    assert done.stdout == "end\n"


# -- what it must not reach -----------------------------------------------------------------------------------------


def test_the_directory_of_control_sockets_is_concealed(emu: Runner) -> None:
    done = emu.run("run", "--debug", "--", "true")
    concealed = re.findall(r"conceal (\S+)", done.stderr)
    assert concealed
    for directory in concealed:
        inside = emu.shell(f"ls -A {directory}; touch {directory}/x; umount {directory}; echo; stat -c %a {directory}")
        assert inside.stdout.split() == ["0"]
        if not emu.plain_user:  # whose directory is in a mount namespace of its own
            assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o700
            assert not (Path(directory) / "x").exists()


def test_the_audit_log_can_be_read_and_not_changed(emu: Runner) -> None:
    log = emu.place / "audit.log"
    program = foreign_program(emu.place)
    done = emu.shell(
        f"{program} true; grep -c BPRM_CHECK {log}; echo forged >>{log}; rm -f {log}; mv {log} {log}2; umount {log};"
        f" mount -o remount,bind,rw {log}; echo forged >>{log}; : >{log}",
        *emu.with_policy(),
        "--audit-log",
        str(log),
    )
    assert done.stdout == "1\n"
    assert "forged" not in log.read_text()
    assert log.read_text().startswith("type=")


def test_the_supervisor_cannot_be_reached(emu: Runner) -> None:
    done = emu.shell(
        "umount /proc 2>/dev/null; umount -l /proc 2>/dev/null; for p in /proc/[0-9]*; do echo x >$p/mem; done"
    )
    assert done.returncode != 125


def test_pid_1_can_be_neither_read_nor_traced(emu: Runner) -> None:
    done = emu.shell("cat /proc/1/environ; ls /proc/1/fd; readlink /proc/1/exe; echo end")
    assert done.stdout == "end\n"


@pytest.mark.needs("root")
def test_a_tree_run_by_root_cannot_reach_the_disks(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=False)
    done = emu.shell(
        "mknod node b 7 0; mknod null c 1 3; true <node && echo made; true <null && echo made;"
        "for d in /dev/*; do [ -b $d ] && true <$d && echo opened $d; done;"
        "true </dev/mem && echo opened; true </dev/null && echo end"
    )
    assert done.stdout == "end\n"


@pytest.mark.needs("root")
def test_a_tree_run_by_root_cannot_change_the_kernel(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=False)
    name = Path("/proc/sys/kernel/core_pattern")
    before = name.read_text()
    done = emu.shell(
        f"echo '|/nowhere' >{name}; mount -o remount,rw /proc/sys; mount -o remount,rw /sys; echo x >{name}"
    )
    assert name.read_text() == before
    assert done.returncode != 0


# -- after the point of no return ----------------------------------------------------------------------------------


def test_a_program_whose_loader_is_denied_dies_of_a_segmentation_fault(emu: Runner) -> None:
    policy = emu.with_policy()[1]
    program = Path("/bin/true").resolve()
    done = emu.run("run", "--boot-policy", policy, "--boot-verified", str(program), "--", str(program))
    assert done.returncode == 128 + signal.SIGSEGV
    assert re.search(r" 1 +EXECUTE +MMAP +\S*/ld", done.stderr)


# -- declared volumes -----------------------------------------------------------------------------------------------


def test_a_verity_volume_is_read_only_and_its_facts_stay_with_its_mount(emu: Runner) -> None:
    volume = emu.place / "volume"
    volume.mkdir()
    program = foreign_program(volume)
    (volume / "sub").mkdir()
    facts = emu.place / "facts.toml"
    digest = "ab" * 32
    facts.write_text(
        f'[[file]]\npath = "{volume}"\ndmverity = {{ roothash = "sha256:{digest}", signed = false }}\n'
        '[[file]]\npath = "/usr"\nboot_verified = true\n'
    )
    policy = emu.place / "p.pol"
    policy.write_text(
        "policy_name=P policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
        f"op=EXECUTE dmverity_roothash=sha256:{digest} action=ALLOW\n"
    )
    if emu.plain_user:
        for path in (volume, volume / "sub", program):
            os.chown(path, 64321, 64321)
    done = emu.shell(
        f"cd {volume}; ./busybox echo allowed; touch x; mount -o remount,bind,rw . && echo remounted;"
        f"cd sub; ../busybox echo from-below; umount {volume} && echo unmounted; cp {program} {emu.place}/sh;"
        f"{emu.place}/sh -c 'echo copied'; mount --bind {emu.place} {volume}/sub; {volume}/sub/sh -c 'echo covered'",
        "--boot-policy", str(policy), "--integrity", str(facts),
    )  # fmt: skip
    assert done.stdout.split() == ["allowed", "from-below"]
    assert not (volume / "x").exists()


# -- signals and terminals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_sent_to_us_reach_the_command(emu: Runner, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    with emu.start("run", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=LIMIT)
    assert output == "got\n"
    assert process.returncode == 9


def in_terminal(emu: Runner, script: str) -> tuple["subprocess.Popen[str]", int]:
    ours, theirs = os.openpty()
    if emu.plain_user:
        os.fchown(theirs, 64321, 64321)
    # A session of its own, whose terminal it is: setsid(1) gives it that, and goes on as its leader.
    process = subprocess.Popen(
        ["setsid", "--ctty", *emu.command_line("run", "--", "sh", "-c", script)],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=emu.place, text=True,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'fs'}"},
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_until(fd: int, text: bytes) -> bytes:
    said = b""
    while text not in said:
        said += os.read(fd, 1024)
    return said


def test_an_interrupt_from_the_terminal_reaches_the_command_once(emu: Runner) -> None:
    wait = "i=0; while [ $i -lt 20 ]; do sleep 0.05; i=$((i+1)); done"
    script = f"n=0; trap 'n=$((n+1)); echo int $n' INT; echo ready; {wait}; exit $((n+6))"
    process, terminal = in_terminal(emu, script)
    try:
        read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        assert b"int 1" in read_until(terminal, b"int 1")
        assert process.wait(LIMIT) == 7
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_stopping_at_the_terminal_stops_us_and_continuing_continues_the_command(emu: Runner) -> None:
    # The leader of a session whose group is an orphan is not stopped by its terminal: a shell must stand between.
    process, terminal = in_terminal(emu, "echo ready; read line; echo got $line")
    try:
        read_until(terminal, b"ready")
        command = next(
            pid
            for pid in descendants_of(process.pid)  # not those of another run of these tests
            if _is_shell(pid)
        )
        os.kill(command, signal.SIGSTOP)
        wait_until(lambda: state_of(process.pid) == "T", "the supervisor stops with its command")
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: state_of(command) == "S", "the command goes on")
        os.write(terminal, b"word\n")
        assert b"got word" in read_until(terminal, b"got word")
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _is_shell(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0")


def mounts_of_a_run(place: Path) -> list[str]:
    """Mounts that only a sandbox can have made and that are seen from here.

    Not whatever bears the emulator's name: a checkout may, and another run of these tests has mounts in one.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    staging, emulated = " - tmpfs ipe-emu ", (" /sys/kernel/security ", " - fuse")
    return [line for line in lines if str(place) in line or staging in line or all(part in line for part in emulated)]


# -- deaths ---------------------------------------------------------------------------------------------------------


def started(emu: Runner, mark: str) -> "subprocess.Popen[str]":
    """A run whose tree has a process in the foreground and one that left its session; both bear ``mark``."""
    script = "setsid sh -c 'while :; do busybox sleep 1000; done' $0 & echo ready; while :; do busybox sleep 1000; done"
    process = emu.start("run", *emu.with_policy(), "--", "sh", "-c", script, mark)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_until(lambda: len(processes_with(mark)) >= 4, "the processes of the tree")
    return process


def test_killing_the_supervisor_leaves_nothing(emu: Runner) -> None:
    mark = f"{emu.place}/mark"
    with started(emu, mark) as process:
        kill(process.pid)
        wait_until(lambda: not processes_with(mark), "the end of every process")
    assert not mounts_of_a_run(emu.place)


def test_killing_the_agent_ends_the_run_as_not_judged(emu: Runner) -> None:
    mark = f"{emu.place}/mark"
    with started(emu, mark) as process:
        (agent,) = children_of(process.pid)
        kill(agent)
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 125
        assert "the sandbox died" in errors
        wait_until(lambda: not processes_with(mark), "the end of every process")


def test_killing_pid_1_ends_the_run_as_not_judged(emu: Runner) -> None:
    mark = f"{emu.place}/mark"
    with started(emu, mark) as process:
        (agent,) = children_of(process.pid)
        (pid_1,) = (pid for pid in children_of(agent) if b"init" in Path(f"/proc/{pid}/comm").read_bytes())
        kill(pid_1)
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 125
        assert "the sandbox died" in errors
        wait_until(lambda: not processes_with(mark), "the end of every process")


def test_killing_the_supervisor_while_the_tree_works_leaves_nothing(emu: Runner) -> None:
    mark = f"{emu.place}/mark"
    script = "echo ready; while :; do busybox true; cat /sys/kernel/security/ipe/enforce >/dev/null; done"
    with emu.start("run", *emu.with_policy(), "--", "sh", "-c", script, mark) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        kill(process.pid)
        wait_until(lambda: not processes_with(mark), "the end of every process")


# -- over and over --------------------------------------------------------------------------------------------------


def test_twenty_runs_in_a_row_leave_nothing(emu: Runner) -> None:
    mark = f"{emu.place}/mark"
    for number in range(20):
        done = emu.run(
            "run", *emu.with_policy(), "--", "sh", "-c", f"cat /sys/kernel/security/ipe/enforce; exit {number}", mark
        )
        assert (done.stdout, done.returncode) == ("1", number)
    assert processes_with(mark) == []
    assert not mounts_of_a_run(emu.place)


def test_five_hundred_executions(emu: Runner) -> None:
    done = emu.shell(
        "i=0; n=0; while [ $i -lt 500 ]; do busybox true && n=$((n+1)); i=$((i+1)); done; echo $n", *emu.with_policy()
    )
    assert done.stdout == "500\n"
    assert "denied" not in done.stderr


def test_many_at_once(emu: Runner) -> None:
    script = (
        "i=0; while [ $i -lt 40 ]; do (busybox true && cat /sys/kernel/security/ipe/enforce) & i=$((i+1)); done; wait"
    )
    assert emu.shell(script, *emu.with_policy()).stdout == "1" * 40
