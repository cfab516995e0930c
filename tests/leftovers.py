"""What tests must not leave behind: processes, mounts, loop devices, and sockets that somebody listens at."""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

#: Every process that a test starts inherits this, daemons too: that is how they are found.
_MARK = "IPE_EMU_TEST_SESSION"
#: How long what is ending may take, in seconds.
_GRACE = 5.0


def mark_environment() -> None:
    """Make every process started from now on recognisable."""
    os.environ[_MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"


def leftovers(below: Path) -> list[str]:
    """What is left behind, after giving what is just ending the time to end.

    Mounts, files behind loop devices and sockets are looked for ``below``: others are those of somebody else.

    Nothing is left only if two looks in a row find nothing: a process in the middle of execve(2) shows no environment.
    """
    deadline = time.monotonic() + _GRACE
    clean = 0
    while True:
        found = [*_processes(), *things_left(below)]
        clean = 0 if found else clean + 1
        if clean == 2 or time.monotonic() > deadline:
            return found
        time.sleep(0.02)  # nothing announces that a process of somebody else's is gone


def _processes() -> Iterator[str]:
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield f"process {entry.name}: {(entry / 'cmdline').read_bytes()!r}"
        except OSError:  # gone meanwhile, or not ours to look at
            continue


def things_left(below: Path) -> list[str]:
    """What exists now, but for processes, and has to do with a directory."""
    return [*_mounts(below), *_loop_devices(below), *_sockets(below)]


def _loop_devices(below: Path) -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            behind = path.read_text(errors="surrogateescape").strip()
        except OSError:  # let go of meanwhile
            continue
        if behind.startswith(f"{below}/"):
            yield f"loop device: {path.parent.parent.name} of {behind}"


def _sockets(below: Path) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines():
        name = line.split(maxsplit=7)[7:]
        if name and name[0].removeprefix("@").startswith(f"{below}/"):
            yield f"socket: {name[0]}"


def _mounts(below: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        point = line.split()[4]
        if point.startswith(f"{below}/"):
            yield f"mount: {line}"
