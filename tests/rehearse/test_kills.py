"""What is left when the supervisor of a boot is killed: nothing."""

import contextlib
import os
import random
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests.exec_hook.running import LIMIT, Runner, processes_with, wait_until
from tests.leftovers import things_left
from tests.rehearse.images import BOOT_POLICY, MOUNTS, build_tree
from tests.volumes.images import make_image

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


#: Busy with everything that a boot is: executions, mounts, a disk that a program of its own reads, policies.
BUSY = f"""{MOUNTS}
mount -t squashfs -o ro /dev/vda /newroot
sleep {MARK} &
setsid sleep {MARK} > /dev/null &
while :; do
    mount -t tmpfs none /tmp; cat $IPE/policies/*/name /newroot/etc/hello > /tmp/text; umount /tmp
done
"""


def start(emu: Runner, tree: Path, *options: str, **more: object) -> "subprocess.Popen[str]":
    policy = emu.place / "boot.pol"
    policy.write_text(BOOT_POLICY)
    return emu.start("boot", "--boot-policy", str(policy), *options, str(tree), **more)


@pytest.fixture
def temporary(emu: Runner, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files of what is started now."""
    directory = emu.place / "temporary"
    directory.mkdir()
    directory.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


@pytest.fixture
def busy(emu: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An image that is busy until it is killed, and the options for its disk."""
    place = tmp_path_factory.mktemp("root")
    (place / "tree/etc").mkdir(parents=True)
    (place / "tree/etc/hello").write_text("hello\n")
    image = emu.place / "root.img"
    image.write_bytes(make_image(Kind.SQUASHFS, place / "tree", place / "image").read_bytes())
    return build_tree(emu.place / "image", BUSY), "--disk", f"vda={image},ro"


def nothing_is_left(emu: Runner, temporary: Path) -> None:
    wait_until(lambda: not processes_with(MARK), "the end of all machines")
    wait_until(lambda: not things_left(emu.place), "the end of mounts, loop devices and sockets")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_supervisor_that_ends_takes_everything_along(emu: Runner, number: signal.Signals, temporary: Path) -> None:
    tree = build_tree(emu.place / "tree", STUBBORN)
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
    nothing_is_left(emu, temporary)


def test_the_end_of_one_boot_is_none_of_another(emu: Runner, temporary: Path) -> None:
    tree = build_tree(emu.place / "tree", STUBBORN)
    boots = [start(emu, tree, stderr=subprocess.DEVNULL) for _ in range(2)]
    for process in boots:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    wait_until(lambda: len(processes_with(MARK)) == 6, "three sleeping processes each")
    boots[0].kill()
    boots[0].wait(LIMIT)
    wait_until(lambda: len(processes_with(MARK)) == 3, "the end of one machine")
    assert boots[1].poll() is None
    boots[1].kill()
    for process in boots:
        process.communicate(timeout=LIMIT)
    nothing_is_left(emu, temporary)


def kill_after(process: "subprocess.Popen[str]", seconds: float) -> None:
    """Kill a boot at a moment of its own choice: in the middle of something, whatever that is."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        raise AssertionError(f"ended by itself, with status {process.wait(seconds)}")
    process.kill()
    process.wait(LIMIT)


def moments(count: int) -> list[float]:
    """From the first instructions of the program to a machine that has been busy for a while; printed on failure."""
    chosen = [random.uniform(0, 0.8) for _ in range(count)]
    print("killed after", chosen)
    return chosen


def test_ten_boots_that_are_killed_one_after_the_other(
    emu: Runner, busy: tuple[Path, str, str], temporary: Path
) -> None:
    for moment in moments(10):
        kill_after(start(emu, *busy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), moment)
    nothing_is_left(emu, temporary)


def test_boots_that_are_killed_four_at_a_time(emu: Runner, busy: tuple[Path, str, str], temporary: Path) -> None:
    for _ in range(2):
        boots = [start(emu, *busy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(kill_after, boots, moments(4)))
        nothing_is_left(emu, temporary)


def test_boots_that_end_by_themselves_four_at_a_time(emu: Runner, busy: tuple[Path, str, str], temporary: Path) -> None:
    tree = build_tree(emu.place / "tree", BUSY.replace("while :; do", "poweroff -f; while :; do"))

    def end(process: "subprocess.Popen[str]") -> None:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: end(start(emu, tree, *busy[1:])), range(8)))
    nothing_is_left(emu, temporary)
