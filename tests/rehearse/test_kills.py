"""What is left when the supervisor of a boot is killed: nothing."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.exec_hook.running import LIMIT, Runner, processes_with, wait_until
from tests.rehearse.images import BOOT_POLICY, MOUNTS, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

#: Nobody else sleeps for so long, another run of these tests included.
MARK = f"4{os.getpid():07}"
STUBBORN = f"""{MOUNTS}
trap '' TERM INT HUP QUIT
mount -t tmpfs none /newroot
sleep {MARK} &
setsid sleep {MARK} > /dev/null &
unshare -m sleep {MARK} &
echo started
cat $IPE/policies/Boot/name; echo
wait
"""


def start(emu: Runner, tree: Path) -> "subprocess.Popen[str]":
    policy = emu.place / "boot.pol"
    policy.write_text(BOOT_POLICY)
    return emu.start("boot", "--boot-policy", str(policy), str(tree))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_supervisor_that_ends_takes_everything_along(
    emu: Runner, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = build_tree(emu.place / "tree", STUBBORN)
    temporary = emu.place / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(temporary))
    with start(emu, tree) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        wait_until(lambda: len(processes_with(MARK)) == 3, "three sleeping processes")
        process.send_signal(number)
        process.wait(LIMIT)
        expected = -number if number is signal.SIGKILL else 128 + number
        assert process.returncode == expected
        wait_until(lambda: not processes_with(MARK), "the end of the machine")
        # Nobody holds the console any more.
        assert "started" not in process.stdout.read()
        assert process.stderr is not None
        said = process.stderr.read()
    # Who ends a rehearsal still hears what came of it until then.
    assert (f"result: interrupted: the rehearsal was ended by {number.name}" in said) == (number is not signal.SIGKILL)
    assert list(temporary.iterdir()) == []


def test_several_boots_at_once(emu: Runner) -> None:
    tree = build_tree(emu.place / "tree", STUBBORN)
    boots = [start(emu, tree) for _ in range(3)]
    for process in boots:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    boots[0].kill()
    boots[0].wait(LIMIT)
    wait_until(lambda: len(processes_with(MARK)) == 6, "the end of one machine")
    assert boots[1].poll() is None
    for process in boots[1:]:
        process.kill()
        process.wait(LIMIT)
    wait_until(lambda: not processes_with(MARK), "the end of all machines")
    for process in boots:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
