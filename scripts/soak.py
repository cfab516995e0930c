"""The long loops: what tests do a few times, for minutes. Stops at the first thing that hangs, fails or stays behind.

usage: soak.py [SECONDS_PER_LOOP]
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ipe_emu.linux.mounts import mounts

HERE = Path(__file__).parent
EMU = Path(sys.executable).parent / "ipe-emu"
BOOT_POLICY = HERE / "demo-boot" / "boot.pol"
MARK = f"6{os.getpid():07}"  # seconds that nobody else sleeps for
LIMIT = 30  # seconds that any one step may take


def emu(*arguments: str | Path, check: bool = True) -> "subprocess.CompletedProcess[bytes]":
    """Run the program; an unexpected status ends the soak with what it said."""
    done = subprocess.run([EMU, *arguments], capture_output=True, timeout=LIMIT, check=False)
    if check and done.returncode:
        raise SystemExit(f"{arguments}: status {done.returncode}\n{done.stderr.decode(errors='replace')}")
    return done


def daemon_of(directory: Path) -> int:
    """The process that serves a mount."""
    status = emu("status", directory).stdout.decode()
    return int(status.partition("process ")[2].partition("\n")[0])


def mount_and_unmount(directory: Path) -> None:
    """One mount, one look, one unmount."""
    emu("mount", directory, "--boot-policy", BOOT_POLICY)
    if (directory / "ipe" / "enforce").read_text() != "1":
        raise SystemExit("enforce does not say 1")
    emu("umount", directory)


def _poke(directory: Path, stop: float) -> None:
    numbers = random.Random(0)
    while time.monotonic() < stop:
        with suppress(OSError):  # the emulator is killed under it
            node = directory / "ipe" / numbers.choice(["enforce", "success_audit"])
            if numbers.random() < 0.5:
                node.read_bytes()
            else:
                node.write_bytes(b"1")


def kill_under_load(directory: Path) -> None:
    """Kill the emulator while four threads poke it, and mount again in the same place."""
    emu("mount", directory, "--boot-policy", BOOT_POLICY)
    process = daemon_of(directory)
    with ThreadPoolExecutor(4) as pool:
        pokers = [pool.submit(_poke, directory, time.monotonic() + 0.3) for _ in range(4)]
        time.sleep(0.15)  # in the middle of it
        os.kill(process, signal.SIGKILL)
        for poker in pokers:
            poker.result(timeout=LIMIT)
    emu("mount", directory, "--boot-policy", BOOT_POLICY)
    if (directory / "ipe" / "enforce").read_text() != "1":
        raise SystemExit("enforce does not say 1 after a kill")
    emu("umount", directory)


def many_processes(_directory: Path) -> None:
    """A tree of short processes, in several at once, under run."""
    loop = "for i in 1 2 3 4; do (for j in $(seq 50); do /bin/true; done) & done; wait"
    emu("run", "--boot-policy", BOOT_POLICY, "--boot-verified", "/usr", "--", "sh", "-c", loop)


def kill_a_run(_directory: Path) -> None:
    """Kill the supervisor of a tree that is busy: the tree must end with it."""
    loop = "while :; do /bin/true; done"
    with subprocess.Popen(
        [EMU, "run", "--", "sh", "-c", f"echo ready; {loop}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise SystemExit("the tree did not start")
        time.sleep(random.random() / 10)
        process.kill()
        # The pipe ends when the last process of the tree does.
        waiting = ThreadPoolExecutor(1)
        waiting.submit(process.stdout.read).result(timeout=LIMIT)
        waiting.shutdown()


def small_image(directory: Path) -> Path:
    """An initramfs directory whose init is busy until it is killed; its processes have ``MARK`` as an argument."""
    image = directory.with_name("image")
    if not image.exists():
        (image / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", image / "bin/busybox")
        (image / "bin/sh").symlink_to("busybox")
        (image / "init").write_text(
            "#!/bin/sh\nexport PATH=/bin\nfor kind in proc sysfs devtmpfs; do\n"
            "busybox mkdir /$kind; busybox mount -t $kind none /$kind; done\n"
            "busybox mount -t securityfs none /sysfs/kernel/security\n"
            f"busybox sleep {MARK} & busybox setsid busybox sleep {MARK} &\n"
            "while :; do busybox true; busybox cat /sysfs/kernel/security/ipe/policies/*/name; done\n"
        )
        (image / "init").chmod(0o755)
    return image


def marked() -> list[str]:
    """The processes that have ``MARK`` as an argument."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and MARK.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found


def kill_boots(directory: Path) -> None:
    """Kill the supervisors of four boots at random moments, from their first instructions on."""
    image = small_image(directory)
    boots = [
        subprocess.Popen(
            [EMU, "boot", "--boot-policy", BOOT_POLICY, image], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(directory.parent)},
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in boots:
        time.sleep(random.random() / 4)
        process.kill()
        process.wait(LIMIT)
    end = time.monotonic() + LIMIT
    while marked():
        if time.monotonic() > end:
            raise SystemExit(f"processes stayed behind: {marked()}")
        time.sleep(0.05)
    left = {path.name for path in directory.parent.iterdir()} - {directory.name, image.name}
    if left:
        raise SystemExit(f"files stayed behind: {left}")


def main() -> None:
    """Run every loop for its time."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    loops: tuple[Callable[[Path], None], ...] = (
        mount_and_unmount,
        kill_under_load,
        many_processes,
        kill_a_run,
        kill_boots,
    )
    with tempfile.TemporaryDirectory(prefix="ipe-soak.") as name:
        directory = Path(name) / "mounted"
        directory.mkdir()
        for loop in loops:
            end = time.monotonic() + seconds
            turns = 0
            while time.monotonic() < end:
                loop(directory)
                turns += 1
            left = [os.fsdecode(mount.path) for mount in mounts() if mount.path.startswith(os.fsencode(name))]
            if left:
                raise SystemExit(f"{loop.__name__}: mounts stayed behind: {left}")
            print(f"{loop.__name__}: {turns} turns in {seconds:.0f} s, nothing left behind", flush=True)


if __name__ == "__main__":
    main()
