"""Whole boots of small images: policies change hands, roots are switched, machines end."""

import json
import os
import re
import termios
from pathlib import Path

import pytest

from tests.capabilities import NOT_ROOT
from tests.exec_hook.running import LIMIT, Runner, runner
from tests.exec_hook.test_modules import MODULE
from tests.exec_hook.tracee_harness import compile_c
from tests.rehearse.images import BOOT_POLICY, MOUNTS, NEW_ROOT, boot, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

LOCKDOWN = """policy_name=Lockdown policy_version=1.0.0
DEFAULT action=ALLOW
op=POLICY action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
"""
STRICT = """policy_name=Strict policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
"""
TAKE_OVER = f"""{MOUNTS}
cat /etc/new.pol > $IPE/new_policy
for policy in $IPE/policies/*; do
    [ $policy = $IPE/policies/Boot ] || echo 1 > $policy/active
done
echo 1 > $IPE/policies/Boot/delete
echo policies: $(ls $IPE/policies)
{NEW_ROOT}
umount /sys/kernel/security /sys /proc /dev || echo cannot unmount
exec switch_root /newroot /init an argument
"""
NEW_INIT = """#!/bin/sh
echo in the new root: pid $$, $# arguments: $*
/bin/busybox poweroff -f
"""


def test_an_unsigned_policy_takes_over_and_a_new_root_runs(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", TAKE_OVER, {"etc/new.pol": LOCKDOWN, "etc/newinit": NEW_INIT})
    done = boot(emu, tree, cmdline="ipe.success_audit=1")
    assert done.output == ["policies: Lockdown", "in the new root: pid 1, 2 arguments: an argument"]
    assert done.status == 0, done.errors
    # The kernel's own execution, before there is a process of another name.
    first = done.records[0]
    assert re.search(
        r'ipe_op=EXECUTE ipe_hook=BPRM_CHECK enforcing=1 pid=1 comm="swapper/0" path="/init" dev="rootfs" ino=\d+'
        r' rule="op=EXECUTE boot_verified=TRUE action=ALLOW"$',
        first,
    ), first
    admitted = done.record("ipe_hook=POLICY_LOAD")
    assert 'path="/bin/busybox" dev="rootfs"' in admitted
    assert 'rule="op=POLICY boot_verified=TRUE action=ALLOW"' in admitted
    assert 'policy_name="Lockdown" policy_version=1.0.0' in done.record("IPE_POLICY_LOAD")
    activated = done.record("IPE_CONFIG_CHANGE")
    assert 'old_active_pol_name="Boot"' in activated
    assert 'new_active_pol_name="Lockdown"' in activated
    # The first root is the initramfs's until its last program; the new root is not.
    last = done.record('comm="switch_root" path="/init"')
    assert 'dev="tmpfs"' in last
    assert 'rule="DEFAULT action=ALLOW"' in last
    after = done.records[done.records.index(last) + 1 :]
    assert after
    assert all('dev="tmpfs"' in record for record in after)
    assert "policy deleted: Boot (by init, pid 1)" in done.errors
    assert "result: as expected: powered off, by reboot(2)" in done.errors
    assert "done here, refused by linux-7.3: 1; the first: unsigned policy Lockdown" in done.errors


SEEK = """#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        printf("%ld ", (long)lseek(open(argv[i], O_RDONLY), 0, SEEK_CUR));
    puts("");
}
"""


def test_nodes_have_no_position_and_what_else_is_served_has(one: Runner, tmp_path: Path) -> None:
    script = f"{MOUNTS}/bin/seek $IPE/enforce $IPE/../lsm /proc/cmdline /dev/vda /dev/null /init\npoweroff -f\n"
    tree = build_tree(one.place / "tree", script)
    compile_c(SEEK, tree / "bin/seek", "-static")
    (one.place / "disk").write_bytes(bytes(4096))
    done = boot(one, tree, "--disk", f"vda={one.place / 'disk'}")
    assert done.output == ["-1 0 0 0 0 0 "], done.errors


def test_a_policy_of_ima_is_read_by_ipes_leave(emu: Runner) -> None:
    script = f"""{MOUNTS}
    echo /etc/ima.pol > /sys/kernel/security/ima/policy || echo refused
    mount -t tmpfs none /tmp && cp /etc/ima.pol /tmp
    echo /tmp/ima.pol > /sys/kernel/security/ima/policy || echo refused
    poweroff -f
    """
    done = boot(emu, build_tree(emu.place / "tree", script, {"etc/ima.pol": "audit func=BPRM_CHECK\n"}))
    assert done.output == ["sh: write error: Permission denied", "refused"]
    assert 'comm="init" path="/tmp/ima.pol" dev="tmpfs"' in done.record("ipe_op=POLICY ipe_hook=KERNEL_READ")
    assert "/tmp/ima.pol on tmpfs" in done.errors
    assert "not done: write to ima/policy: 1 rule(s) of IMA are not in force (by init, pid 1)" in done.errors


def test_the_new_root_is_not_boot_verified(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", TAKE_OVER, {"etc/new.pol": STRICT, "etc/newinit": NEW_INIT})
    done = boot(emu, tree)
    assert done.status == 1
    assert done.output == ["policies: Strict", "switch_root: can't execute '/init': Permission denied"]
    denied = done.record("ipe_op=EXECUTE")
    assert 'pid=1 comm="switch_root" path="/init" dev="tmpfs"' in denied
    assert 'rule="DEFAULT action=DENY"' in denied
    assert "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100" in done.errors
    assert "result: the policy failed it: unverified file executed: tmpfs is neither the initramfs" in done.errors
    assert "denied: EXECUTE BPRM_CHECK /init on tmpfs: DEFAULT action=DENY" in done.errors


def test_a_released_kernel_refuses_the_unsigned_policy(one: Runner) -> None:
    tree = build_tree(one.place / "tree", TAKE_OVER, {"etc/new.pol": LOCKDOWN, "etc/newinit": NEW_INIT})
    done = boot(one, tree, "--kernel", "linux-7.3")
    assert done.status == 1
    assert "policies: Boot" in done.output
    assert "failed: writing new_policy: EBADMSG" in done.errors


def test_the_rehearsal_can_end_at_the_new_root(one: Runner) -> None:
    tree = build_tree(one.place / "tree", TAKE_OVER, {"etc/new.pol": LOCKDOWN, "etc/newinit": NEW_INIT})
    done = boot(one, tree, "--until", "switch-root")
    assert done.status == 0
    assert done.output == ["policies: Lockdown"]
    assert "result: as expected: switched to a new root, where /init is executed" in done.errors


def test_a_denial_at_the_new_root_is_a_failure_there_too(one: Runner) -> None:
    tree = build_tree(one.place / "tree", TAKE_OVER, {"etc/new.pol": STRICT, "etc/newinit": NEW_INIT})
    assert boot(one, tree, "--until", "switch-root").status == 1


def test_subordinate_ids_become_owners(tmp_path: Path) -> None:
    if not (emu := runner(tmp_path, plain_user=tmp_path.owner() == "root", subordinate_ids=True)).plain_user:
        pytest.skip(NOT_ROOT)
    tree = build_tree(
        emu.place / "tree", "chown 5:7 /etc/file; stat -c %u:%g /etc/file; poweroff -f\n", {"etc/file": ""}
    )
    done = boot(emu, tree)
    assert done.output == ["5:7"]
    assert done.status == 0


# -- a command in the new root ----------------------------------------------------------------------------------------

SWITCH = f"""{NEW_ROOT}
mount -t proc proc /newroot/proc
exec switch_root /newroot /init
"""
LASTING_INIT = "#!/bin/sh\n/bin/busybox sleep 1000\n"


@pytest.mark.parametrize(("command", "status"), [("test $$ -gt 1 && ls / | grep -q proc", 0), ("exit 7", 3)])
def test_a_command_is_run_beside_the_new_init(emu: Runner, command: str, status: int) -> None:
    tree = build_tree(emu.place / "tree", SWITCH, {"etc/newinit": LASTING_INIT})
    busybox = 'busybox() { /bin/busybox "$@"; }; ls() { busybox ls "$@"; }; grep() { busybox grep "$@"; }; '
    done = boot(emu, tree, "--then", f"{busybox} {command}", policy=None)
    assert done.status == status, done.errors
    assert f"returned {7 if status else 0}" in done.errors


def test_a_command_is_judged_as_all_else_is(one: Runner) -> None:
    # Programs named init are the last that may run.
    policy = LOCKDOWN.replace("DEFAULT action=ALLOW", "DEFAULT action=ALLOW\nDEFAULT op=EXECUTE action=ALLOW")
    tree = build_tree(one.place / "tree", TAKE_OVER, {"etc/new.pol": policy, "etc/newinit": LASTING_INIT})
    done = boot(one, tree, "--then", "exec /bin/busybox true", cmdline="ipe.success_audit=1")
    assert done.status == 0, done.errors
    # The command's shell, and what it executes.
    assert 'comm="then" path="/bin/busybox" dev="tmpfs"' in done.record('comm="then"')
    assert 'dev="tmpfs"' in done.record('ipe_hook=BPRM_CHECK .* comm="sh" path="/bin/busybox"')


def test_what_still_runs_when_the_command_ends_is_no_failure(one: Runner) -> None:
    busy = "#!/bin/sh\nwhile :; do /bin/busybox true; done\n"
    tree = build_tree(one.place / "tree", SWITCH, {"etc/newinit": busy})
    done = boot(one, tree, "--then", "exec /bin/busybox sleep 0.2", policy=None)
    assert done.status == 0, done.errors


def test_a_command_that_does_not_come_to_its_end(one: Runner) -> None:
    tree = build_tree(one.place / "tree", SWITCH, {"etc/newinit": "#!/bin/sh\n/bin/busybox poweroff -f\n"})
    done = boot(one, tree, "--then", "exec /bin/busybox sleep 1000", policy=None)
    assert done.status == 3
    assert "was not run to its end" in done.errors


def test_a_command_without_a_new_root(one: Runner) -> None:
    done = boot(one, build_tree(one.place / "tree", "poweroff -f\n"), "--then", "true")
    assert done.status == 3
    assert "was not run to its end" in done.errors
    assert boot(one, one.place / "tree", "--then", "true", "--until", "switch-root").status == 2


# -- on a terminal ----------------------------------------------------------------------------------------------------


def on_terminal(emu: Runner, tree: Path, typed: bytes, until: bytes) -> tuple[int, bytes]:
    """Boot on a terminal, type something when ``ready`` is there; return the status and what was on the screen."""
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    with emu.start("boot", str(tree), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        screen = b""
        while b"ready" not in screen:
            screen += os.read(ours, 1000)
        os.write(ours, typed)
        while until not in screen:
            screen += os.read(ours, 1000)
        status = process.wait(LIMIT)
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    os.close(ours)
    return status, screen


def test_a_terminal_is_a_serial_console(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "echo ready; read line; echo got $line; stty size; poweroff -f\n")
    status, screen = on_terminal(one, tree, b"some words\r", b"result: ")
    assert status == 0
    # What is typed is echoed once, by the machine's own terminal.
    assert screen.count(b"some words") == 2
    assert b"got some words\r\n" in screen


def test_a_person_can_end_the_rehearsal(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "trap '' INT; echo ready; sleep 1000\n")
    status, _ = on_terminal(one, tree, b"\x03\x1d", b"result: interrupted: ")
    assert status == 130


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("poweroff -f", 0, "as expected: powered off, by reboot(2)"),
        ("reboot -f", 0, "as expected: restarted, by reboot(2)"),
        ("halt -f", 0, "as expected: halted, by reboot(2)"),
        ("exit 3", 3, "Attempted to kill init! exitcode=0x00000300"),
        ("kill -SEGV $$; kill -KILL 1", 3, "Attempted to kill init! exitcode=0x00000000"),
    ],
)
def test_how_a_machine_ends(one: Runner, command: str, status: int, said: str) -> None:
    done = boot(one, build_tree(one.place / "tree", f"mount -t proc proc /proc\n{command}\n"))
    assert done.status == status, done.errors
    assert said in done.errors


def test_a_machine_that_does_not_end(one: Runner) -> None:
    done = boot(one, build_tree(one.place / "tree", "exec sleep 1000\n"), "--timeout", "1")
    assert done.status == 3
    assert "result: the machine failed for its own reasons: still running after 1 s" in done.errors


@pytest.mark.parametrize(
    ("cmdline", "said", "status"),
    [
        ("", "VFS: Unable to mount root fs", 3),
        ("root=/dev/vda1", "a kernel would mount what root= says, which is not emulated", 4),
    ],
)
def test_an_image_without_init(one: Runner, cmdline: str, said: str, status: int) -> None:
    tree = build_tree(one.place / "tree", "")
    (tree / "init").unlink()
    done = boot(one, tree, cmdline=cmdline)
    assert done.status == status, done.errors
    assert said in done.errors


def test_an_init_that_cannot_be_executed(one: Runner) -> None:
    done = boot(one, build_tree(one.place / "tree", "", mode=0o644), "--timeout", "1")
    # The kernel goes on to /bin/sh, which reads an empty console.
    assert "Failed to execute /init (error -13)" in done.errors
    assert "Run /bin/sh as init process" in done.errors


def test_a_policy_that_denies_init(one: Runner) -> None:
    policy = "policy_name=No policy_version=0.0.0\nDEFAULT action=DENY\n"
    done = boot(one, build_tree(one.place / "tree", "echo never\n"), policy=policy)
    assert done.output == []
    assert done.status == 1
    assert "No working init found." in done.errors
    assert 'comm="swapper/0" path="/bin/busybox"' in done.records[-1]  # /bin/sh, the last resort


# -- what the init process gets ---------------------------------------------------------------------------------------


def test_words_of_the_command_line_reach_init(one: Runner) -> None:
    script = 'echo "$0 $*"; env | sort; id -u; tty; cat /proc/self/stat | cut -d" " -f5-7; poweroff -f\n'
    tree = build_tree(one.place / "tree", f"mount -t proc proc /proc; {script}")
    done = boot(one, tree, cmdline="quiet one mod.x=1 TERM=vt100 X=a=b ro two -- three=3 quiet")
    assert done.output[0] == "/init one two three=3 quiet"
    assert done.output[1:6] == ["HOME=/", "PATH=/bin", "PWD=/", "SHLVL=1", "TERM=vt100"]
    assert done.output[6:9] == ["X=a=b", "0", "/dev/console"]
    assert done.output[9] == "0 0 0"  # no process group, no session, no terminal of its own
    assert done.status == 0


def test_another_init_can_be_asked_for(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "", {"etc/other": "#!/bin/sh\necho other $*\n/bin/poweroff -f\n"})
    done = boot(one, tree, cmdline="lost rdinit=/etc/other kept")
    assert done.output == ["other kept"]


def test_the_release_is_that_of_the_image_s_modules(emu: Runner) -> None:
    script = "hostname here; uname -a; poweroff -f\n"
    tree = build_tree(emu.place / "tree", script, {"lib/modules/6.99.1-test/modules.dep": ""})
    done = boot(emu, tree)
    assert done.output[0].startswith("Linux here 6.99.1-test ")
    (tree / "usr/lib/modules/6.99.2").mkdir(parents=True)
    done = boot(emu, tree, "--kernel", "linux-6.12")
    assert done.output[0].startswith("Linux here 6.12.0 ")


def test_a_module_of_the_image_is_judged(one: Runner, tmp_path: Path) -> None:
    module = compile_c(MODULE, tmp_path / "x.ko", "-c").read_bytes()
    policy = BOOT_POLICY + "op=KMODULE boot_verified=FALSE action=ALLOW\n"
    files: dict[str, str | bytes] = {
        "lib/modules/6.99/kernel/x.ko": module,
        "lib/modules/6.99/modules.dep": "kernel/x.ko:\n",
    }
    tree = build_tree(one.place / "tree", "modprobe x; poweroff -f\n", files)
    done = boot(one, tree, policy=policy)
    assert 'path="/lib/modules/6.99/kernel/x.ko" dev="rootfs"' in done.record("ipe_op=KMODULE ipe_hook=KERNEL_READ")
    assert done.status == 1
    done = boot(one, tree, policy=BOOT_POLICY + "op=KMODULE boot_verified=TRUE action=ALLOW\n")
    assert done.status == 0, done.errors
    assert "x.ko was not loaded" in done.errors


def test_permissive_mode_by_the_command_line(one: Runner) -> None:
    policy = BOOT_POLICY.replace("boot_verified=TRUE", "boot_verified=FALSE")
    done = boot(one, build_tree(one.place / "tree", "echo ran; poweroff -f\n"), policy=policy, cmdline="ipe.enforce=0")
    assert done.output == ["ran"]
    assert done.status == 0
    assert "enforcing=0" in done.records[0]


def test_without_a_policy_everything_runs(one: Runner) -> None:
    done = boot(one, build_tree(one.place / "tree", "echo ran; poweroff -f\n"), policy=None)
    assert done.output == ["ran"]
    assert done.records == []


# -- bad usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--timeout", "nan", "/"), "not between 0 and"),
        (("--timeout", "-1", "/"), "not between 0 and"),
        (("--cmdline", "x" * 2048, "tree"), "longer than 2047 bytes"),
        (("--cmdline", " ".join(map(str, range(40))), "tree"), "more than 32 arguments"),
        (("absent",), "absent: No such file or directory"),
    ],
)
def test_bad_usage(one: Runner, options: tuple[str, ...], said: str) -> None:
    build_tree(one.place / "tree", "poweroff -f\n")
    done = one.run("boot", *options)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_report_is_written_when_there_is_one(one: Runner) -> None:
    tree = build_tree(one.place / "tree", "echo never\n")
    (one.place / "old.json").write_text("kept")
    reports = ("--html", "new.html", "--json", "old.json")
    assert one.run("boot", *reports, "--cmdline", "x" * 2048, str(tree)).returncode == 2
    assert not (one.place / "new.html").exists()
    assert (one.place / "old.json").read_text() == "kept"
    for option, path, said in (("--html", "absent/x", "No such file"), ("--json", ".", "Is a directory")):
        done = one.run("boot", option, path, str(tree))
        assert done.returncode == 2
        assert f"{option} {path}: {said}" in done.stderr
        assert "never" not in done.stdout


def test_an_interrupted_boot_is_reported_as_far_as_it_came(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", "echo started; exec sleep 1000\n")
    with emu.start("boot", "--json", "report.json", str(tree)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.wait(LIMIT) == 143
    report = json.loads((emu.place / "report.json").read_text())
    assert report["result"] == "interrupted"
    assert report["status"] == 143
    assert report["executions"] >= 2
