"""Start real mounts: each emulator is a process of its own, as one process can serve one FUSE session only.

Used as a program it is that process, without the command line of ipe-emu around it.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import define

from ipe_emu.cli.audit_log import open_audit_log
from ipe_emu.errors import IpeEmuError
from ipe_emu.integrity import declared
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.linux import mountinfo
from ipe_emu.lsm import Ipe
from ipe_emu.profiles import PROFILES
from ipe_securityfs import daemon
from tests.vectors import BOOT_POLICY, KEYS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 30.0
#: The boot policy and the keys of the machines that answers were recorded on.
RECORDED_MACHINES: tuple[str | Path, ...] = (
    "--boot-policy", BOOT_POLICY, "--builtin-keys", KEYS / "builtin-trusted.pem",
)  # fmt: skip


def command(*arguments: str | Path) -> list[str]:
    """The command line of an emulator."""
    return [sys.executable, "-m", "tests.securityfs.emulator", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Where this repository's packages are found."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}


@define
class Emulator:
    """A running emulator: its directory, its process, its audit log."""

    directory: Path
    process: subprocess.Popen[bytes]
    audit_log: Path

    @property
    def ipe(self) -> Path:
        return self.directory / "ipe"

    @property
    def policies(self) -> Path:
        return self.ipe / "policies"

    def names(self) -> set[str]:
        return {path.name for path in self.policies.iterdir()}

    def records(self) -> list[str]:
        """The text of every record so far, with its type."""
        lines = self.audit_log.read_text(errors="surrogateescape").splitlines()
        return [line.split(" ", 1)[0].removeprefix("type=") + " " + line.partition("): ")[2] for line in lines]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def mounted(
    directory: Path,
    *arguments: str | Path,
    kernel: str = "linux-7.3",
    wrap: Sequence[str] = (),
    trust: Sequence[str | Path] = RECORDED_MACHINES,
) -> Iterator[Emulator]:
    """Mount an emulator, with the recorded machines' boot policy and keys; unmounted in the end, whatever happened."""
    directory.mkdir(exist_ok=True)
    audit_log = directory.parent / f"{directory.name}.audit"
    audit_log.touch()
    started = command(directory, "--kernel", kernel, *trust, "--audit-log", audit_log, *arguments)
    process = subprocess.Popen([*wrap, *started], stdout=subprocess.PIPE, env=environment(), cwd="/")
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, f"the emulator did not start: status {process.wait(SECONDS)}"
        assert json.loads(ready)["mountpoint"] == str(directory)
        yield Emulator(directory, process, audit_log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--kernel", default="op-policy")
    parser.add_argument("--boot-policy", type=Path)
    parser.add_argument("--builtin-keys", type=Path)
    parser.add_argument("--platform-keys", type=Path)
    parser.add_argument("--audit-log", default="-")
    parser.add_argument("--integrity", type=Path, action="append", default=[])
    parser.add_argument("--boot-verified", type=Path, action="append", default=[])
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--no-assume", action="store_true")
    options = parser.parse_args()

    builtin = load_certificates([options.builtin_keys]) if options.builtin_keys else ()
    platform = load_certificates([options.platform_keys]) if options.platform_keys else None
    keyrings = Keyrings(builtin=builtin, platform=platform)
    ipe = Ipe(keyrings, emit=open_audit_log(options.audit_log), profile=PROFILES[options.kernel])
    if options.boot_policy:
        ipe.load_boot_policy(options.boot_policy.read_bytes())
    facts = declared.load(mountinfo.locate, options.integrity, options.boot_verified)
    wanted = daemon.MountOptions(
        options.directory, force=options.force, assume_mac_admin=False if options.no_assume else None
    )

    def say(mounted: daemon.Mounted) -> None:
        print(json.dumps({"mountpoint": mounted.mountpoint, "pid": mounted.pid, "log": mounted.log}), flush=True)

    try:
        if options.background:
            say(daemon.mount_in_background(ipe, facts, wanted))
        else:
            daemon.mount_in_foreground(ipe, facts, wanted, say)
    except IpeEmuError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _main()
