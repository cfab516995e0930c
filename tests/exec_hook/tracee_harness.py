"""A rehearsed process for tests, without the sandbox around it: a root of its own, the filter, the hook in a thread."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attrs import define, field

from ipe_emu.audit import AuditRecord
from ipe_emu.event import Subject
from ipe_emu.exec_hook.hook import ExecHook, Judge
from ipe_emu.exec_hook.plan import Event
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.integrity.sources import OpenFile, Place
from ipe_emu.keyring import Keyrings
from ipe_emu.linux.seccomp import Listener, Notification
from ipe_emu.lsm import Decision, Ipe
from ipe_emu.profiles import PROFILES

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 20

_ASKED = re.compile(r'ipe_hook=(\w+) .* path="?([^" ]*)"? ')
HELLO = '#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n'


@define
class FactsOfDevices:
    """Facts by the device a file lies on, or by its path on its file system."""

    devices: dict[int, Facts] = field(factory=dict)
    paths: dict[bytes, Facts] = field(factory=dict)

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        return self.paths.get(place.path if place else b"", self.devices.get(st.st_dev, NO_FACTS))


@define
class Notes:
    """What the hook reported."""

    denials: list[Event] = field(factory=list)
    unjudged: list[tuple[str, str]] = field(factory=list)
    undone: list[tuple[str, str]] = field(factory=list)

    def denied(self, event: Event, decision: Decision) -> bool:
        self.denials.append(event)
        return False

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        self.unjudged.append((call, reason))

    def not_done(self, subject: Subject | None, call: str, what: str) -> None:
        self.undone.append((call, what))


def model(policy: str, emit: Callable[[AuditRecord], None], *, kernel: str = "linux-7.3", enforce: bool = True) -> Ipe:
    """Return an LSM whose active policy has the rules ``policy``; it audits successes too."""
    ipe = Ipe(Keyrings(), emit, PROFILES[kernel], enforce, success_audit=True)
    if policy:
        ipe.load_boot_policy(f"policy_name=test policy_version=0.0.1\n{policy}".encode())
    return ipe


class Inside:
    """A Python process with a root of its own. `run` executes statements in it and returns their ``result``.

    This one is under no filter: what it sees are the answers of the machine's kernel.
    """

    def __init__(self, mount_point: Path, tree: Path | None = None, **options: Any) -> None:
        mount_point.mkdir(exist_ok=True)
        ours, theirs = socket.socketpair()
        ours.settimeout(LIMIT_SECONDS)
        options = {"bare": True, "tree": tree and str(tree), "mount_point": str(mount_point)} | options
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("tracee_main.py")),
                str(theirs.fileno()),
                json.dumps(options),
            ],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "fs")])},
        )
        theirs.close()
        self.pid = self._process.pid
        self._channel = ours
        greeting, self._fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not greeting:
            raise RuntimeError(f"the tracee ended with {self._process.wait(LIMIT_SECONDS)}")
        self._lines = ours.makefile("rw")

    def _go(self) -> None:
        self._channel.send(b"G")

    def device_of(self, path: str) -> int:
        """Return the device number of what lies at ``path`` inside."""
        return Path(f"/proc/{self.pid}/root{path}").stat().st_dev

    def run(self, source: str, **values: Any) -> Any:
        """Execute statements inside, with ``values`` as names; return what they leave in ``result``."""
        assignments = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        self._lines.write(json.dumps(assignments + textwrap.dedent(source)) + "\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline())
        assert "traceback" not in answer, answer["traceback"]
        return answer["value"]

    def __enter__(self) -> Self:
        self._go()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait(LIMIT_SECONDS)


class Rehearsal(Inside):
    """The same under the filter, with a hook that answers in a thread. At first no policy is active."""

    def __init__(
        self,
        mount_point: Path,
        tree: Path | None = None,
        *,
        securityfs: int | None = None,
        traps: Sequence[Trap] = (),
        **options: Any,
    ) -> None:
        trapped = [trap.syscall for trap in traps]
        super().__init__(mount_point, tree, bare=False, securityfs=securityfs is not None, traps=trapped, **options)
        self._traps = traps
        self.records: list[AuditRecord] = []
        self.notes = Notes()
        self.calls: list[Notification] = []
        self.facts: Any = FactsOfDevices()
        self.securityfs = securityfs
        self._hook = self._new_hook(model("", self.records.append))
        self._listener = Listener(self._fds[0])
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _new_hook(self, ipe: Judge) -> ExecHook:
        machine = Path(f"/proc/{self.pid}/ns/user").stat().st_ino
        return ExecHook(
            ipe, self.facts, self.notes, machine=machine, pid_depth=0, securityfs=self.securityfs, traps=self._traps
        )

    def judge(self, judge: Judge) -> None:
        """Have another judge decide from now on."""
        self._hook = self._new_hook(judge)
        self.forget()

    def policy(self, rules: str, *, kernel: str = "linux-7.3", enforce: bool = True) -> None:
        """Have a policy of ``rules`` decide from now on, with what was recorded so far forgotten."""
        self.judge(model(rules, self.records.append, kernel=kernel, enforce=enforce))

    def forget(self) -> None:
        """Forget what was recorded and reported."""
        self.records.clear()
        self.calls.clear()
        self.notes.denials.clear()
        self.notes.unjudged.clear()
        self.notes.undone.clear()

    def texts(self) -> list[str]:
        """Return the texts of the audit records so far."""
        return [record.text.decode("utf-8", "surrogateescape") for record in self.records]

    def asked(self) -> list[str]:
        """Return the hooks and paths of the audit records so far, such as ``MMAP /bin/true``."""
        return [f"{found[1]} {found[2]}" for text in self.texts() if (found := _ASKED.search(text))]

    def _answer(self) -> None:
        while (notification := self._listener.receive()) is not None:
            self.calls.append(notification)
            self._hook.answer(self._listener, notification)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._thread.join(LIMIT_SECONDS)
        assert not self._thread.is_alive(), "processes are left under the filter"
        self._listener.close()


def compile_c(source: str, target: Path, *flags: str) -> Path:
    """Compile a C program."""
    subprocess.run(["gcc", "-O1", "-x", "c", "-", "-o", str(target), *flags], input=source, text=True, check=True)
    return target


def build_tree(root: Path) -> Path:
    """Build the files that the recorded decisions are about: an initramfs with busybox, a C library, and /t."""
    here = root / "t"
    for name in ("bin", "t/bin", "t/lib", "t/script", "lib64", "sys/kernel/security"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is missing"
    shutil.copy(busybox, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    shutil.copy(busybox, here / "bin/sh")
    compile_c(HELLO, here / "bin/hello")
    compile_c(HELLO, here / "bin/hello_static", "-static")
    compile_c(HELLO, here / "bin/execstack", "-z", "execstack")
    compile_c(HELLO, here / "bin/execstack_static", "-static", "-z", "execstack")
    compile_c("int f(void) { return 1; }\n", here / "lib/libf.so", "-shared", "-fPIC")
    (root / "usr").mkdir()
    (root / "usr/lib").symlink_to("../lib")  # newer C libraries look there; the paths that were recorded are in /lib
    for library in _libraries(here / "bin/hello"):
        target = root / library.removeprefix("/usr").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    executables = {
        "script/s.sh": b"#!/bin/sh\nexit 0\n",
        "script/v.sh": b"#!/mnt/dmv/bin/sh\nexit 0\n",
        "script/i.sh": b"#!/no/such/interpreter\nexit 0\n",
        "bin/garbage": b"this is no program\n" * 20,
        "trusted.der": b"0\x82\x03\x7d" + bytes(range(256)),
    }
    for name, content in executables.items():
        (here / name).write_bytes(content)
        (here / name).chmod(0o755)
    for name in ("mod.ko", "kernel"):
        (here / name).write_bytes(b"neither a module nor a kernel\n" * 100)
    (here / "ima.pol").write_bytes(b"# of IMA\ndont_measure fsmagic=0x9fa0\naudit func=BPRM_CHECK\n")
    (here / "out").symlink_to("/run/t/bin/hello_static")
    return root


def _libraries(program: Path) -> Iterator[str]:
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    for word in listing.split():
        if word.startswith("/"):
            yield word
