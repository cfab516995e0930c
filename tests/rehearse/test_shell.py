"""The debugging shell, on real terminals: what it finds, what it may do, and that none of it counts."""

import json
import os
import re
import select
import signal
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.exec_hook.running import LIMIT, Runner, processes_with, wait_until
from tests.rehearse.images import BOOT_POLICY, MOUNTS, NEW_ROOT, add_programs, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

PROMPT = rb"\[ipe-emu\] \S+ # "
#: A program that the boot policy denies.
DENIED = "mount -t tmpfs none /tmp; cp /bin/busybox /tmp/true"
NOTHING = "policy_name=No policy_version=0.0.0\nDEFAULT action=DENY\n"
FINAL = "policy_name=Final policy_version=1.0.0\nDEFAULT action=ALLOW\n"


class Terminal:
    """A boot on a terminal, and what a person does at it."""

    def __init__(self, ours: int) -> None:
        self._ours = ours
        self._screen = b""
        self._read = 0
        self.status: int | None = None

    @property
    def screen(self) -> str:
        return self._screen.decode(errors="replace").replace("\r", "")

    def until(self, pattern: bytes) -> bytes:
        """Read until the pattern is there, after what was found before; return what came before it."""
        end = time.monotonic() + LIMIT
        while not (found := re.compile(pattern).search(self._screen, self._read)):
            assert select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0], (pattern, self.screen)
            self._screen += os.read(self._ours, 1 << 16)
        before = self._screen[self._read : found.start()]
        self._read = found.end()
        return before

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def command(self, text: str) -> str:
        """Have the shell, which is waiting for it, do something; return what that prints, as ``$(…)`` does."""
        self.type(f"{text}; echo do''ne\r".encode())
        self.until(rb"echo do''ne\s+")
        return self.until(rb"done\r\n" + b"(?s:.*?)" + PROMPT).decode().replace("\r", "").rstrip("\n")

    def leave(self) -> None:
        self.type(b"exit\r")


@contextmanager
def at_terminal(emu: Runner, tree: Path, *options: str, policy: str = BOOT_POLICY, **more: Any) -> Iterator[Terminal]:
    """Boot on a terminal, and wait for its end when the person has done all that is to be done."""
    (emu.place / "boot.pol").write_text(policy)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (30, 300))  # no line is broken
    arguments = ("boot", "--boot-policy", "boot.pol", "--json", "report.json", *options, str(tree))
    with emu.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, **more) as process:
        os.close(theirs)
        terminal = Terminal(ours)
        try:
            yield terminal
            terminal.until(rb"ipe-emu: result: [^\n]*\n")
            terminal.status = process.wait(LIMIT)
        finally:
            process.kill()
            os.close(ours)


def report(emu: Runner) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((emu.place / "report.json").read_text())
    return found


def test_the_machine_is_there_when_it_has_ended(emu: Runner) -> None:
    script = f"{MOUNTS}{DENIED}\nsleep 4000333 &\necho on the console\npoweroff -f\n"
    tree = build_tree(emu.place / "tree", script, {"etc/final.pol": FINAL})
    with at_terminal(emu, tree, "--shell") as terminal:
        terminal.until(b"the machine is powered off, and is stopped there")
        terminal.until(PROMPT)
        # Its processes, all of them stopped; its mounts; its securityfs.
        states = terminal.command("for p in /proc/[0-9]*/stat; do cut -d' ' -f1-3 $p; done")
        for process in (r"1 \(init\) T", r"\d+ \(sleep\) T", r"\d+ \(poweroff\) T"):
            assert re.search(f"^{process}$", states, re.MULTILINE), states
        assert "none on /tmp type tmpfs" in terminal.command("mount")
        assert terminal.command("cat /sys/kernel/security/ipe/policies/Boot/active; echo") == "1"
        # What it executes of the machine's is judged, its own program is not.
        assert terminal.command("/tmp/true; echo $?").splitlines()[-2:] == ["sh: /tmp/true: Permission denied", "126"]
        assert terminal.command("/bin/busybox echo runs") == "runs"
        # What it changes is changed: a program of the initramfs may load a policy, this one may not.
        load = "/etc/final.pol > /sys/kernel/security/ipe/new_policy; ls -1 /sys/kernel/security/ipe/policies"
        assert terminal.command(f"cat {load}").endswith("cat: write error: Permission denied\nBoot")
        assert terminal.command(f"/bin/busybox cat {load}").endswith("Boot\nFinal")
        terminal.leave()
    # And nothing of that counts.
    assert terminal.status == 0, terminal.screen
    found = report(emu)
    assert found["result"] == "as-expected"
    assert not found["denials"]
    assert not found["failed_writes"]
    assert not found["refused_by_released_kernels"]
    assert [policy["name"] for policy in found["policies"]] == ["Boot"]
    assert found["events"][-1]["event"] == "Rebooted"


def test_a_shell_as_on_a_terminal(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", f"{MOUNTS}exit 3\n")
    mark = f"4{os.getpid():07}"  # nobody else sleeps for so long
    with at_terminal(emu, tree, "--shell") as terminal:
        terminal.until(PROMPT)
        terminal.type(f"sleep {mark}\r".encode())
        wait_until(lambda: processes_with(mark), "the sleep")
        terminal.type(b"\x03")
        terminal.until(PROMPT)
        assert not processes_with(mark)
        terminal.type(f"sleep {mark}\r".encode())
        wait_until(lambda: processes_with(mark), "the other sleep")
        terminal.type(b"\x1a")
        terminal.until(PROMPT)
        assert re.search(rf"\[1\]\+ +Stopped +sleep {mark}", terminal.command("jobs"))
        assert terminal.command("stty size") == "30 300"
        assert re.search(r"(?m)^[1-9]\d* [1-9]\d* 34\d+$", terminal.command("cut -d' ' -f5-7 /proc/$$/stat"))
        terminal.type(b"\x04")  # the job is told of
        terminal.until(PROMPT)
        terminal.type(b"\x04")
    assert terminal.status == 3
    assert not processes_with(mark)
    assert "Attempted to kill init! exitcode=0x00000300" in report(emu)["headline"]


COUNTING = f"""{MOUNTS}{DENIED}
while :; do echo $((n += 1)) > /tmp/count; done &
/tmp/true
echo it returned $?
/tmp/repaired
/tmp/true
poweroff -f
"""


def test_a_shell_where_something_is_denied(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", COUNTING)
    with at_terminal(emu, tree, "--shell-on-denial") as terminal:
        terminal.until(b"denied: EXECUTE BPRM_CHECK /tmp/true on tmpfs")
        terminal.until(b"the machine was denied something, and is stopped there")
        assert b"returned" not in terminal.until(PROMPT)
        states = terminal.command("cut -d' ' -f2-3 /proc/[0-9]*/stat")
        assert states.count("(init) T") == 3, states
        count = terminal.command("cat /tmp/count")
        assert terminal.command("/tmp/true; cp /bin/busybox /tmp/other; /tmp/other") != ""
        assert terminal.command("cat /tmp/count") == count
        # Repaired, the machine goes on; and a second denial is no reason to stop again.
        terminal.command("mkdir /repair; ln -s /bin/echo /tmp/repaired")
        terminal.leave()
        terminal.until(rb"it returned 126\r\n")
    assert terminal.status == 1
    found = report(emu)
    assert [denial["file"]["path"] for denial in found["denials"]] == ["/tmp/true"]
    assert found["denials"][0]["times"] == 2
    assert found["events"][-1]["event"] == "Rebooted"
    assert any("the machine was stopped for a shell" in warning for warning in found["warnings"])


def test_both_shells(one: Runner) -> None:
    tree = build_tree(one.place / "tree", f"{MOUNTS}{DENIED}; /tmp/true\ncat /tmp/note; poweroff -f\n")
    with at_terminal(one, tree, "--shell", "--shell-on-denial", "--timeout", "30") as terminal:
        terminal.until(PROMPT)
        terminal.command("echo from the first > /tmp/note")
        terminal.leave()
        terminal.until(rb"from the first\r\n")
        terminal.until(b"the machine is powered off, and is stopped there")
        terminal.until(PROMPT)
        assert terminal.command("cat /tmp/note") == "from the first"
        terminal.leave()
    assert terminal.status == 1


LOAD = "cat /etc/final.pol > $IPE/new_policy"


def test_who_writes_is_not_taken_for_one_that_is_stopped(one: Runner) -> None:
    # The machine's cat was denied and is stopped as its write returns; the shell's writes the same to the same node.
    policy = BOOT_POLICY.replace("op=POLICY", "op=KMODULE")
    tree = build_tree(one.place / "tree", f"{MOUNTS}{LOAD}\npoweroff -f\n", {"etc/final.pol": FINAL})
    with at_terminal(one, tree, "--shell-on-denial", policy=policy) as terminal:
        terminal.until(PROMPT)
        said = terminal.command("IPE=/sys/kernel/security/ipe; " + LOAD)
        assert "denied: POLICY POLICY_LOAD /memfd:busybox (deleted)" in said
        terminal.leave()
    found = report(one)
    assert [(denial["file"]["path"], denial["times"]) for denial in found["denials"]] == [("/bin/busybox", 1)]
    assert len(found["failed_writes"]) == 1


SWITCH = f"{NEW_ROOT}exec switch_root /newroot /init\n"
LOST_LOADER = f"""{MOUNTS}mv /lib64 /kept; mkdir /lib64; mount -t tmpfs none /lib64; cp /kept/* /lib64
exec /usr/sbin/env
"""


@pytest.mark.parametrize(
    ("script", "options", "policy", "said", "status"),
    [
        ("", ("--shell",), NOTHING, b"for it has no init process", 1),
        ("", ("--shell-on-denial",), NOTHING, b"was denied something", 1),
        (SWITCH, ("--shell", "--until", "switch-root"), BOOT_POLICY, b"is in its next root", 1),
        ("exec sleep 1000\n", ("--shell", "--timeout", "1"), BOOT_POLICY, b"time is over", 3),
        (LOST_LOADER, ("--shell",), BOOT_POLICY, b"its init process is killed", 1),
        (LOST_LOADER, ("--shell-on-denial",), BOOT_POLICY, b"was denied something", 1),
    ],
    ids=["panic", "panic-denial", "switch-root", "timeout", "mmap", "mmap-denial"],
)
def test_ends_at_which_there_is_a_machine_still(
    one: Runner, script: str, options: tuple[str, ...], policy: str, said: bytes, status: int
) -> None:
    tree = build_tree(one.place / "tree", script, {"etc/newinit": "#!/bin/sh\n"})
    add_programs(tree, "env")
    if "switch-root" in options:
        policy += "op=EXECUTE action=ALLOW\n"
        status = 0
    with at_terminal(one, tree, *options, policy=policy) as terminal:
        terminal.until(said)
        terminal.until(PROMPT)
        assert "/bin/busybox" in terminal.command("ls /bin/busybox")
        # Where /proc is not mounted, it has one of its own.
        assert "proc on /proc type proc" in terminal.command("mount")
        assert terminal.command("cut -d' ' -f3 /proc/1/stat") == "T"
        terminal.leave()
    assert terminal.status == status, terminal.screen


@pytest.mark.parametrize("keys", [b"poweroff -f\r", b"\x1d"])
def test_other_ways_to_leave(one: Runner, keys: bytes) -> None:
    tree = build_tree(one.place / "tree", f"{MOUNTS}{DENIED}; /tmp/true; poweroff -f\n")
    for option, status in (("--shell", 1), ("--shell-on-denial", 1 if keys != b"\x1d" else 128 + signal.SIGINT)):
        with at_terminal(one, tree, option) as terminal:
            terminal.until(PROMPT)
            terminal.type(keys)
        assert terminal.status == status
        assert report(one)["result"] == "denied"


def test_an_init_that_is_killed_leaves_nothing_to_look_at(one: Runner) -> None:
    # No call of its own is seen, as with a bad pointer. From outside: inside nobody can.
    mark = f"5{os.getpid():07}"
    tree = build_tree(one.place / "tree", f"exec sleep {mark}\n")
    with at_terminal(one, tree, "--shell") as terminal:
        wait_until(lambda: processes_with(mark), "the sleep")
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)
        terminal.until(b"no shell: the init process died, and the whole machine with it")
    assert terminal.status == 3


def test_it_cannot_leave_the_machine(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", f"{MOUNTS}poweroff -f\n")
    with at_terminal(emu, tree, "--shell") as terminal:
        terminal.until(PROMPT)
        # Nothing of this machine's is open in it but its terminal.
        assert set(re.findall(r"-> (\S+)", terminal.command("ls -l /proc/$$/fd"))) <= {
            *re.findall(r"/dev/pts/\d+", terminal.command("readlink /proc/$$/fd/0")), "/dev/tty",
        }  # fmt: skip
        for kind in ("mnt", "pid", "user", "net", "ipc", "uts"):
            of = [terminal.command(f"readlink /proc/{process}/ns/{kind}") for process in ("1", "$$")]
            assert of[0] == of[1]
            assert of[0] != str(Path(f"/proc/self/ns/{kind}").readlink())
        # Its calls are answered as those of all others are: mknod, mount, and what judges it.
        assert "can't" in terminal.command("mknod /tmp/disk b 8 0 && dd if=/tmp/disk count=1 2>&1 | grep can")
        assert terminal.command("grep Seccomp: /proc/$$/status").split() == ["Seccomp:", "2"]
        terminal.leave()
    assert terminal.status == 0


def test_it_needs_a_terminal(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "poweroff -f\n")
    done = one.run("boot", "--shell", str(tree))
    assert done.returncode == 2
    assert "--shell: standard input and output must be a terminal" in done.stderr


def test_it_needs_a_busybox_that_needs_nothing(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "poweroff -f\n")
    programs = one.place / "programs"
    programs.mkdir()
    for content, said in ((None, "no busybox is installed"), (Path("/bin/true").read_bytes(), "needs libraries")):
        if content is not None:
            (programs / "busybox").write_bytes(content)
            (programs / "busybox").chmod(0o755)
        ours, theirs = os.openpty()
        environment = {**os.environ, "PATH": str(programs)}
        with one.start("boot", "--shell", str(tree), stdin=theirs, stdout=theirs, env=environment) as process:
            _, errors = process.communicate(timeout=LIMIT)
        os.close(ours)
        os.close(theirs)
        assert process.returncode == 77
        assert said in errors
        assert "apt-get install busybox-static" in errors
