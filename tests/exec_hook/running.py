"""Running ``ipe-emu run`` for tests: as the caller, and, where that is root, as a user without privileges as well."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from attrs import frozen

from tests.rootless import ROOT, UID, as_plain_user

#: Every wait of these tests ends after so many seconds, as a failure.
LIMIT = 60.0

BOOT_POLICY = b"""policy_name=Initramfs policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=POLICY boot_verified=TRUE action=ALLOW
"""


@frozen
class Runner:
    """Starts ``ipe-emu``; ``place`` is a directory that whoever runs it may write to."""

    place: Path
    plain_user: bool
    subordinate_ids: bool = False
    fuse: bool = True

    def command_line(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "ipe_emu", *arguments]
        if not self.plain_user:
            return command
        return as_plain_user(command, self.place, subordinate_ids=self.subordinate_ids, fuse=self.fuse)

    def start(self, *arguments: str, **options: object) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]  # options of any type
            self.command_line(*arguments),
            **{
                "cwd": self.place, "env": environment, "text": True, "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options,
            },
        )  # fmt: skip

    def run(self, *arguments: str, data: str | None = None, **options: object) -> "subprocess.CompletedProcess[str]":
        if data is not None:
            options["stdin"] = subprocess.PIPE
        with self.start(*arguments, **options) as process:
            try:
                output, errors = process.communicate(data, timeout=LIMIT)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def shell(self, script: str, *options: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script under the emulator."""
        return self.run("run", *options, "--", "sh", "-c", script)

    def with_policy(self) -> tuple[str, ...]:
        """The options for a machine that allows only what is below /usr."""
        policy = self.place / "boot.pol"
        policy.write_bytes(BOOT_POLICY)
        return ("--boot-policy", str(policy), "--boot-verified", "/usr")


def runner(place: Path, *, plain_user: bool, subordinate_ids: bool = False, fuse: bool = True) -> Runner:
    if plain_user:
        os.chown(place, UID, UID)
    return Runner(place, plain_user, subordinate_ids, fuse)


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Wait for something that nothing announces."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.01)


def processes_with(mark: str) -> list[int]:
    """The processes whose command line has ``mark`` as a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants_of(pid: int) -> Iterator[int]:
    for child in children_of(pid):
        yield child
        yield from descendants_of(child)


def namespaces_of(pids: Sequence[int], kind: str) -> set[str]:
    return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for pid in pids}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
