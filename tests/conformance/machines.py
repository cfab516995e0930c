"""Machines that are asked: a reference kernel in user mode, and the emulator (Debian's own kernel: stock.py)."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from tests.conformance import volumes

ROOT = Path(__file__).parent.parent.parent
Sequence = list[dict[str, Any]]
Answers = list[dict[str, Any]]
Trusts = Literal["builtin", "platform"]

_INIT = """\
#!/bin/busybox sh
# The initramfs of a reference kernel: the host's files read-only, and what this test needs on /mnt.
set -e
b=/bin/busybox
{prepare}$b mount {host} /host -o ro
$b mount -t proc proc /host/proc
$b mount -t sysfs sysfs /host/sys
$b mount -t securityfs securityfs /host/sys/kernel/security
$b mount -t devtmpfs dev /host/dev
$b ln -s /proc/self/fd /host/dev/fd
$b mount -t tmpfs -o mode=755 tmpfs /host/mnt
$b mkdir /host/mnt/initramfs /host/mnt/batch
$b mount --bind /t /host/mnt/initramfs
$b mount {batch} /host/mnt/batch
set +e
# As switch_root does it, but nothing is deleted. Without the move the driver could make no user namespaces.
cd /host
$b mount --move . /
$b chroot . /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C PYTHONDONTWRITEBYTECODE=1 \\
    PYTHONPATH={root}:{root}/fs {python} -m tests.conformance.driver \\
    /mnt/batch/batch.json /mnt/batch/answers.json /sys/kernel/security netlink executing
$b poweroff -f
"""


class MachineError(Exception):
    """A machine did not answer a batch; the message holds what it printed."""


@frozen
class UserModeLinux:
    """A reference kernel, booted anew for each batch."""

    program: Path
    name: str
    on_volumes: bool = False
    seconds: float = 900.0

    def answer(self, batch: list[Sequence]) -> list[Answers]:
        with tempfile.TemporaryDirectory(prefix="ipe-uml.") as name:
            work = Path(name)
            (work / "batch.json").write_text(json.dumps(batch))
            if self.on_volumes:
                volumes.write(work / "volumes.json")
            image = work / "initramfs"
            image.write_bytes(initramfs(work, host="-t hostfs -o / none", batch=f"-t hostfs -o {work} none"))
            command = [
                self.program, "mem=320M", f"initrd={image}", "con0=fd:0,fd:1", "con=null", "quiet", "ipe.enforce=0",
                "ipe.success_audit=0", "panic=-1", f"uml_dir={work}",
            ]  # fmt: skip
            printed = run(command, self.seconds, cwd=work)
            return answers(work, printed)


@frozen
class MountedEmulator:
    """``ipe-emu mount``, in a mount namespace of its own. Nothing that is executed is judged.

    ``trusts``: the reference kernels' boot policy and built-in keys, or the same keys in the platform's keyring alone.
    """

    profile: str
    on_volumes: bool = False
    seconds: float = 900.0
    trusts: Trusts = "builtin"
    under_run = False

    @property
    def name(self) -> str:
        command = f"ipe-emu {'run' if self.under_run else 'mount'} --kernel {self.profile}"
        command += " --platform-keys ..." if self.trusts == "platform" else ""
        return command + (" --volume ..." if self.on_volumes else "")

    def answer(self, batch: list[Sequence]) -> list[Answers]:
        with tempfile.TemporaryDirectory(prefix="ipe-emu.") as name:
            work = Path(name)
            (work / "batch.json").write_text(json.dumps(batch))
            if self.on_volumes:
                volumes.write(work / "volumes.json")
            command = [
                "unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.conformance.emulated",
                "run" if self.under_run else "mount", self.profile, self.trusts, work,
            ]  # fmt: skip
            environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}
            printed = run(command, self.seconds, cwd=Path("/"), env=environment)
            return answers(work, printed)


@frozen
class RunningEmulator(MountedEmulator):
    """``ipe-emu run``: what is executed is judged."""

    under_run = True


def run(command: list[Any], seconds: float, **options: Any) -> str:
    """Run a machine until it ends; what it printed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
            check=False, **options,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"no answer after {seconds:.0f} s:\n{(error.stdout or b'').decode(errors='replace')}"
        ) from None
    return bytes(done.stdout).decode(errors="replace")


def answers(work: Path, printed: str) -> list[Answers]:
    """What the driver wrote; MachineError with what the machine printed if it wrote nothing."""
    try:
        answered: list[Answers] = json.loads((work / "answers.json").read_text())
    except OSError:
        raise MachineError(f"it gave no answers:\n{printed[-6000:]}") from None
    return answered


def initramfs(work: Path, *, host: str, batch: str, modules: Iterable[Path] = ()) -> bytes:
    """The image, which first loads ``modules`` in their order; ``host`` and ``batch`` are what mount(8) mounts."""
    tree = work / "tree"
    for name in ("bin", "host", "t", "proc"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None, "make setup installs busybox"
    shutil.copy2(busybox, tree / "bin" / "busybox")
    init = tree / "init"
    prepare = ""
    for module in modules:
        shutil.copy2(module, tree)
        prepare += f"$b insmod /{module.name}\n"
    init.write_text(_INIT.format(prepare=prepare, host=host, batch=batch, root=ROOT, python=sys.executable))
    init.chmod(0o755)
    fill(tree / "t")
    return packed(tree)


def packed(tree: Path) -> bytes:
    """A tree as an initramfs image; busybox packs it."""
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    done = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), capture_output=True, check=True,
        timeout=60,
    )  # fmt: skip
    return gzip.compress(done.stdout, 1)


def fill(directory: Path) -> None:
    """The files that decisions are about, as they are on the initramfs."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    (directory / "bin").mkdir(parents=True)
    files = {
        "bin/busybox": Path(busybox).read_bytes(),
        "bin/true": b"#!/mnt/initramfs/bin/busybox true\n",
        "bin/script": b"#!/bin/sh\necho a script\n",
        "bin/nested": b"#!/mnt/initramfs/bin/true x\n",
        "bin/lost": b"#!/no/such/interpreter\n",
        "bin/garbage": b"no program at all\n",
        "bin/empty": b"",
        "bin/dynamic": Path("/usr/bin/true").read_bytes(),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
        (directory / name).chmod(0o755)
    (directory / "bin/plain").write_bytes(b"#!/bin/sh\n")
    (directory / "bin/plain").chmod(0o644)
