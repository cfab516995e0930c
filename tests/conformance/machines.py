"""Machines that are asked: a reference kernel in user mode, and the emulator (Debian's own kernel: stock.py)."""

import abc
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from attrs import field, frozen

from tests.conformance import driver, files, seals, volumes

ROOT = Path(__file__).parent.parent.parent
Sequence = list[dict[str, Any]]
Answers = list[dict[str, Any]]
Trusts = Literal["builtin", "platform"]
Medium = Literal["volumes", "seals"]

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


def medium_of(way: str) -> Medium | None:
    """What a machine needs for sequences of a way (generate.WAYS)."""
    return way if way in ("volumes", "seals") else None  # type: ignore[return-value] # mypy does not narrow by "in"


class MachineError(Exception):
    """A machine did not answer a batch; the message holds what it printed."""


@frozen(kw_only=True)
class Machine(abc.ABC):
    """What is started anew for each batch. ``medium``: what its files lie on, beside the initramfs and tmpfs."""

    medium: Medium | None = None
    seconds: float = 900.0
    #: Whether it mounts file systems itself.
    is_kernel: ClassVar[bool] = True

    def answer(self, batch: list[Sequence]) -> list[Answers]:
        """Have the driver do a batch; MachineError with what the machine printed if it did not."""
        with self._work() as work:
            (work / "batch.json").write_text(json.dumps(batch))
            return self._done(work, "answers.json")

    def type_in(self, script: str) -> list[Any]:
        """Run a printed script (script.py); the result of each of its steps. Errors as `answer`."""
        with self._work() as work:
            (work / "batch.json").write_text("[]")
            (work / driver.SCRIPT).write_text(script)
            self._done(work, "answers.json")
            lines = (work / driver.PRINTED).read_text().splitlines()
            return [json.loads(line.partition(": ")[2]) for line in lines]

    @abc.abstractmethod
    def start(self, work: Path) -> str:
        """Let the machine do what ``work`` says, until it ends; return what it printed."""

    @contextlib.contextmanager
    def _work(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ipe-conformance.") as name:
            work = Path(name)
            if self.medium == "volumes":
                volumes.write(work)
            elif self.medium == "seals":
                seals.write(work, image=self.is_kernel)
            yield work

    def _done(self, work: Path, name: str) -> list[Any]:
        printed = self.start(work)
        try:
            answered: list[Any] = json.loads((work / name).read_text())
        except (OSError, ValueError):
            raise MachineError(f"it gave no answers:\n{printed[-6000:]}") from None
        return answered

    def run(self, command: list[Any], **options: Any) -> str:
        """Run a command until it ends; what it printed."""
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                timeout=self.seconds, **options,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise MachineError(f"no answer after {self.seconds:.0f} s:\n{said}") from None
        return bytes(done.stdout).decode(errors="replace")


@frozen
class UserModeLinux(Machine):
    """A reference kernel."""

    program: Path
    name: str

    def start(self, work: Path) -> str:
        image = work / "initramfs"
        image.write_bytes(initramfs(work, host="-t hostfs -o / none", batch=f"-t hostfs -o {work} none"))
        command = [
            self.program, "mem=320M", f"initrd={image}", "con0=fd:0,fd:1", "con=null", "quiet", "ipe.enforce=0",
            "ipe.success_audit=0", "panic=-1", f"uml_dir={work}",
        ]  # fmt: skip
        return self.run(command, cwd=work)


@frozen
class MountedEmulator(Machine):
    """``ipe-emu mount``, in a mount namespace of its own. Nothing that is executed is judged.

    ``trusts``: the reference kernels' boot policy and built-in keys, or the same keys in the platform's keyring alone.
    """

    profile: str
    trusts: Trusts = field(default="builtin", kw_only=True)
    under_run: ClassVar[bool] = False
    is_kernel: ClassVar[bool] = False

    @property
    def name(self) -> str:
        command = f"ipe-emu {'run' if self.under_run else 'mount'} --kernel {self.profile}"
        command += " --platform-keys ..." if self.trusts == "platform" else ""
        return command + {"volumes": " --volume ...", "seals": " --sealable ..."}.get(self.medium or "", "")

    def start(self, work: Path) -> str:
        command = [
            "unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.conformance.emulated",
            "run" if self.under_run else "mount", self.profile, self.trusts, work,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}
        return self.run(command, cwd=Path("/"), env=environment)


@frozen
class RunningEmulator(MountedEmulator):
    """``ipe-emu run``: what is executed is judged."""

    under_run: ClassVar[bool] = True


def initramfs(work: Path, *, host: str, batch: str, modules: Iterable[Path] = ()) -> bytes:
    """The image, which first loads ``modules`` in their order; ``host`` and ``batch`` are what mount(8) mounts."""
    tree = work / "tree"
    for name in ("bin", "host", "t", "proc"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(files.busybox(), tree / "bin" / "busybox")
    init = tree / "init"
    prepare = ""
    for module in modules:
        shutil.copy2(module, tree)
        prepare += f"$b insmod /{module.name}\n"
    init.write_text(_INIT.format(prepare=prepare, host=host, batch=batch, root=ROOT, python=sys.executable))
    init.chmod(0o755)
    files.fill(tree / "t")
    return packed(tree)


def packed(tree: Path) -> bytes:
    """A tree as an initramfs image; busybox packs it."""
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    done = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), capture_output=True, check=True,
        timeout=60,
    )  # fmt: skip
    return gzip.compress(done.stdout, 1)
