"""The machines that boot the images of `boots`: kernels in user mode, Debian's own in QEMU, and the emulator.

Processes and files are numbered in the order in which audit records name them.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve, frozen

from tests import vectors
from tests.conformance.boots import Boot, Built
from tests.conformance.stock import qemu

ROOT = Path(__file__).parent.parent.parent
_RECORD = re.compile(r"type=(14\d\d) audit\([^)]*\): ?([^\r\n]*)")
_STORED = re.compile(r"type=(\w+) msg=audit\([^)]*\): ?(.*)")
_TYPES = {"MAC_STATUS": "1404", "IPE_ACCESS": "1420", "IPE_CONFIG_CHANGE": "1421", "IPE_POLICY_LOAD": "1422"}
#: Every record is printed, and as fast as they come.
_CMDLINE = ("ipe.success_audit=1", "sysctl.kernel.printk_ratelimit=0")
#: What a kernel that prints times says, which can come in the middle of a line of somebody else's.
_KERNEL_LINE = re.compile(r"\[ *\d+\.\d{6}\] [^\n]*\n")

#: A kernel can lose the end of what it printed when it panics or powers off; then it is booted again.
_TRIES = 5
_SECONDS = 120.0

#: A kernel without a boot policy gets it from init, which loads the modules that the image needs under it.
_PRELUDE = """mount -t sysfs sysfs /sys; mount -t securityfs securityfs /sys/kernel/security
cat /etc/boot.p7b >/sys/kernel/security/ipe/new_policy; echo OUT load the boot policy $?
echo 1 >/sys/kernel/security/ipe/policies/AllowInitramfs/active; echo OUT activate it $?
for module in MODULES; do insmod /modules/$module; echo OUT $module $?; done
umount /sys/kernel/security; umount /sys
"""


@frozen
class Came:
    """What a machine printed and recorded."""

    lines: tuple[str, ...]
    records: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        return [*self.lines, *self.records]


class Kernel(Protocol):
    """A real kernel; ``profile`` is what the emulator calls it, and ``emulated`` are options that make it alike."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> str: ...

    @property
    def emulated(self) -> Sequence[str]: ...

    def prepared(self, boot: Boot) -> Boot | None:
        """The boot as this kernel needs it; None if it is not for this kernel."""

    def boot(self, built: Built) -> Came: ...


@frozen
class InUserMode:
    """A reference kernel, with the vectors' boot policy and built-in keys."""

    profile: str
    program: Path

    @property
    def name(self) -> str:
        return self.profile

    @property
    def emulated(self) -> Sequence[str]:
        return (
            f"--boot-policy={vectors.BOOT_POLICY}", f"--builtin-keys={vectors.KEYS / 'builtin-trusted.pem'}",
        )  # fmt: skip

    def prepared(self, boot: Boot) -> Boot:
        return boot

    def boot(self, built: Built) -> Came:
        disks = [f"ubd{letter}r={disk}" for letter, disk in zip("ab", built.disks, strict=False)]
        if built.writable:
            changes = built.image.with_name("changes")
            changes.unlink(missing_ok=True)
            disks[0] = f"ubda={changes},{built.disks[0]}"
        printed = _output(
            self.program, "mem=320M", f"initrd={built.image}", "con=null", "con0=fd:0,fd:1", "root=/dev/none",
            "panic=-1", "ignore_loglevel", *disks, *_CMDLINE, *built.cmdline.split(),
        )  # fmt: skip
        return Came(_lines(printed), _normalised(_RECORD.findall(printed)))


@frozen
class DebianS:
    """Debian's kernel as it is shipped: locked down by Secure Boot, with the keys in the firmware's ``variables``.

    ``modules`` are what it needs and does not have, in the order to load them.
    """

    profile: str
    kernel: Path
    modules: Sequence[Path]
    variables: Path

    @property
    def name(self) -> str:
        return f"Debian's {self.profile}"

    @property
    def emulated(self) -> Sequence[str]:
        return (f"--platform-keys={vectors.KEYS / 'builtin-trusted.pem'}",)

    def prepared(self, boot: Boot) -> Boot | None:
        if boot.builtin_keys:
            return None
        return evolve(
            boot,
            script=_PRELUDE.replace("MODULES", " ".join(module.name for module in self.modules)) + boot.script,
            files={**boot.files, **{f"modules/{module.name}": module.read_bytes() for module in self.modules}},
            signed={**boot.signed, "boot": ("trusted", vectors.BOOT_POLICY.read_text())},
        )

    def boot(self, built: Built) -> Came:
        variables = built.image.with_name("variables")
        variables.write_bytes(self.variables.read_bytes())
        drives = [f"if=virtio,format=raw,readonly=on,file={disk}" for disk in built.disks]
        if built.writable:
            drives[0] = drives[0].replace("readonly=on", "snapshot=on")
        printed = _output(
            *qemu(variables), "-kernel", self.kernel, "-initrd", built.image,
            *(word for drive in drives for word in ("-drive", drive)),
            "-append", " ".join((
                "console=ttyS0 panic=-1 root=/dev/none ignore_loglevel audit_backlog_limit=8192", *_CMDLINE,
                built.cmdline,
            )),
        )  # fmt: skip
        records = [record for line in _KERNEL_LINE.findall(printed) for record in _RECORD.findall(line)]
        return Came(_lines(_KERNEL_LINE.sub("", printed)), _normalised(records))


def on_the_emulator(kernel: Kernel, built: Built) -> Came:
    """Boot it here."""
    log = built.image.parent / "audit.log"
    log.unlink(missing_ok=True)
    printed = _output(
        sys.executable, "-m", "ipe_emu", "boot", "--kernel", kernel.profile, *kernel.emulated, "--audit-log", log,
        "--timeout", "100", "--cmdline", " ".join((*_CMDLINE, built.cmdline)),
        *(
            f"--disk=vd{letter}={disk}" + ",ro" * (letter != "a" or not built.writable)
            for letter, disk in zip("ab", built.disks, strict=False)
        ),
        built.image,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"},
    )  # fmt: skip
    stored = [match for line in log.read_text("latin-1").splitlines() if (match := _STORED.match(line))]
    return Came(_lines(printed), _normalised([(_TYPES[match[1]], match[2]) for match in stored]))


def compare(kernel: Kernel, boot: Boot) -> tuple[Came, Came] | None:
    """Boot the same image on a real kernel and here; None if it is not for this kernel."""
    prepared = kernel.prepared(boot)
    if prepared is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ipe-boot.") as name:
        built = prepared.build(Path(name))
        ours = on_the_emulator(kernel, built)
        for _ in range(_TRIES):
            theirs = kernel.boot(built)
            lost = len(ours.records) - len(theirs.records)
            if lost <= 0 or theirs.records != ours.records[:-lost]:
                break
        return theirs, ours


def _output(*command: Any, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
        timeout=_SECONDS, check=False,
    )  # fmt: skip
    return done.stdout.decode("latin-1").replace("\r", "")


def _lines(printed: str) -> tuple[str, ...]:
    return tuple(line for line in printed.split("\n") if line.startswith("OUT"))


def _normalised(records: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    pids: dict[str, int] = {}
    inodes: dict[str, int] = {}

    def by_order(seen: dict[str, int]) -> Callable[[re.Match[str]], str]:
        return lambda match: f" {match[1]}=#{seen.setdefault(match[2], len(seen))}"

    found = []
    for number, text in records:
        if number not in _TYPES.values():
            continue
        plain = re.sub(r" (pid)=(\d+)", by_order(pids), f"{number} {text}".rstrip())
        plain = re.sub(r" (ino)=(\d+)", by_order(inodes), plain)
        # A kernel for one processor has no number behind the name of its first thread; one in user mode, other disks.
        found.append(plain.replace('comm="swapper"', 'comm="swapper/0"').replace('dev="ubd', 'dev="vd'))
    return tuple(found)
