"""``ipe-emu doctor``: what this machine and this user can do, and the exact remedy for what they cannot."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipe_emu.cli import exit_status
from ipe_emu.cli.subparsers import Subparsers, add_command

if TYPE_CHECKING:
    from ipe_emu.linux.probe import Probe

_COMMANDS = ("run", "boot", "mount")
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        line,
        run,
        description=(
            "Try what the emulator needs, as the user who asks, and say how to mend what does not work. The exit status"
            " is 0 if `run`, `boot` and `mount` will work, and 77 if one of them will not. No kernel profile matters"
            " here."
        ),
        examples="""\
ipe-emu doctor
ipe-emu doctor --json""",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Try everything and print what came of it."""
    from ipe_emu.linux.probe import probe

    probes = [*probe(), _writers_can_be_seen(), *_programs_of_images()]
    works = {command: all(p.ok for p in probes if _needs(command, p)) for command in _COMMANDS}
    if args.json:
        print(json.dumps({"works": works, "probes": [_as_json(p) for p in probes]}, indent=2))
    else:
        _print(probes, works)
    return exit_status.OK if all(works.values()) else exit_status.CANNOT_EMULATE


def _writers_can_be_seen() -> "Probe":
    """Whether a plain user's mount can see how other processes of that user write: Yama may forbid it."""
    from ipe_emu.linux.probe import Probe

    name = "ptrace"
    try:
        scope = _YAMA.read_text().strip()
    except OSError:
        return Probe(name, ok=True, detail="not restricted by Yama", needed_for=("mount",))
    if os.geteuid() == 0 or scope == "0":
        return Probe(name, ok=True, detail=f"kernel.yama.ptrace_scope is {scope}", needed_for=("mount",))
    remedy = "sudo sysctl -w kernel.yama.ptrace_scope=0, or mount as root; `ipe-emu run` does not need it"
    detail = f"kernel.yama.ptrace_scope is {scope}: a mount would refuse every write, not seeing who writes and how"
    return Probe(name, ok=False, detail=detail, remedy=remedy, needed_for=("mount",))


def _needs(command: str, probe: "Probe") -> bool:
    """Whether a command does not work without this; ``boot`` stands on all that ``run`` does."""
    return ("run" if command == "boot" else command) in probe.needed_for


def _programs_of_images() -> "list[Probe]":
    """Whether the programs are there that read images: volumes of ``run``, what ``boot`` boots and its disks."""
    from ipe_emu.rehearse import shell
    from ipe_emu.volumes import programs

    of_file_systems = [
        _program(name, programs.find(kind), programs.PACKAGES[name], f"run --volume and boot --disk: {kind.value}")
        for kind, name in programs.PROGRAMS.items()
    ]
    return [
        *of_file_systems,
        _program("lzop", shutil.which("lzop"), "lzop", "boot: an image compressed with lzo"),
        _program("busybox", _static_busybox(), shell.PACKAGE, "boot --shell: one that needs no libraries"),
    ]


def _static_busybox() -> str | None:
    from ipe_emu.errors import CannotEmulateError
    from ipe_emu.rehearse.shell import static_busybox

    try:
        return str(static_busybox())
    except CannotEmulateError:
        return None


def _program(name: str, found: str | None, package: str, use: str) -> "Probe":
    from ipe_emu.linux.probe import Probe

    if found is not None:
        return Probe(name, ok=True, detail=found)
    return Probe(name, ok=False, detail=f"not installed; for {use}", remedy=f"sudo apt-get install {package}")


def _print(probes: "Sequence[Probe]", works: dict[str, bool]) -> None:
    width = max(len(probe.name) for probe in probes)
    for probe in probes:
        mark = "ok  " if probe.ok else "LACK" if probe.needed_for else "less"
        print(f"{mark}  {probe.name.ljust(width)}  {probe.detail}")
        if probe.remedy:
            print(f"      {' ' * width}  mend it: {probe.remedy}")
    for command, good in works.items():
        print(f"ipe-emu {command} {'works' if good else 'does not work'} here")


def _as_json(probe: "Probe") -> dict[str, object]:
    return {
        "name": probe.name,
        "ok": probe.ok,
        "detail": probe.detail,
        "remedy": probe.remedy or None,
        "needed_for": list(probe.needed_for),
    }
