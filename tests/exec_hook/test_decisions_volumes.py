"""Recorded decisions of two kernels, replayed record for record: nodes, and volumes and overlays of real images.

`ipe-emu run` mounts the images; inside it a Python process is the recorder.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from ipe_emu.volumes.recognise import Kind
from tests import vectors
from tests.exec_hook.running import LIMIT, Runner, runner
from tests.exec_hook.test_decisions import ON_NODES, STEPS, normalised
from tests.rootless import ROOT, UID
from tests.vectors import KEYS
from tests.volumes.images import Volume, make_volume
from tests.volumes.test_image import signature

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("fuse", "busybox", "user-namespaces")]

#: The root hash of the recorded image.
RECORDED = "ea67240e55d25972e46c7cf9ff664457e810f4c3e1315738637e49d52672c154"
_LINE = re.compile(r"type=IPE_ACCESS msg=audit\([^)]*\): (.*)")

#: What the recorded machine had mounted, and did to its overlays.
BEFORE = """
def mount(source, target, kind, flags=0, data=""):
    call("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode() or None)

mount(PLACE, PLACE, "none", MS_BIND | MS_REC)  # a root directory that is no mount's would be in no list of mounts
os.chdir(PLACE)
mount("run", "run", "tmpfs", 0, "mode=755")
shutil.copytree("t", "run/t", symlinks=True)
os.symlink("/mnt/dmvs/bin/hello_static", "run/link")
for name, lower in (("ovl", "mnt/dmvs"), ("ovlt", "t")):
    os.makedirs(f"run/{name}/up")
    os.makedirs(f"run/{name}/work")
    mount("overlay", f"mnt/{name}", "overlay", 0,
          f"lowerdir={lower},upperdir=run/{name}/up,workdir=run/{name}/work,userxattr")
os.utime("mnt/ovl/bin/hello")
shutil.copy("mnt/dmvs/bin/hello_static", "mnt/ovl/bin/hello_new")
mount("mnt/dmvs/bin", "mnt/bind", "none", MS_BIND)
mount("/sys/kernel/security", "sys/kernel/security", "none", MS_BIND)
enforce = os.open("/sys/kernel/security/ipe/enforce", os.O_WRONLY)
os.chroot(".")
os.chdir("/")
os.write(enforce, b"1")
os.close(enforce)
"""


@define(eq=False)
class Recorder:
    """A process inside ``ipe-emu run`` that does what the test sends, and the log of its audit records."""

    process: "subprocess.Popen[str]"
    channel: socket.socket
    log: Path
    _read: int = 0

    def run(self, source: str, **values: Any) -> Any:
        """Execute statements inside; return what they leave in ``result``."""
        assignments = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        self.channel.sendall((json.dumps(assignments + textwrap.dedent(source)) + "\n").encode())
        answer = b""
        while not answer.endswith(b"\n"):
            more = self.channel.recv(1 << 16)
            assert more, self.process.communicate(timeout=LIMIT)[1]
            answer += more
        found = json.loads(answer)
        assert "traceback" not in found, found["traceback"]
        return found["value"]

    def records(self) -> list[str]:
        """The access records since the last call."""
        text = self.log.read_text()
        new, self._read = text[self._read :], len(text)
        return [found[1] for line in new.splitlines() if (found := _LINE.fullmatch(line))]


@contextlib.contextmanager
def recorder(emu: Runner, root: Path, *options: str) -> Iterator[Recorder]:
    log = emu.place / "log"
    log.unlink(missing_ok=True)
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT)
    inside = {"bare": True, "before": [f"PLACE = {str(root)!r}", BEFORE]}
    command = [sys.executable, str(ROOT / "tests/exec_hook/tracee_main.py"), "0", json.dumps(inside)]
    with emu.start("run", *options, "--audit-log", str(log), "--", *command, stdin=theirs) as process, ours:
        theirs.close()
        assert ours.recv(1) == b"B", process.communicate(timeout=LIMIT)[1]
        ours.sendall(b"G")
        recording = Recorder(process, ours, log)
        recording.records()
        yield recording
        ours.shutdown(socket.SHUT_RDWR)
        errors = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 0, errors
        assert "could not be judged" not in errors


def groups(kernel: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rules of each policy, and its steps on volumes and nodes."""
    rules, group = "", list[dict[str, Any]]()
    for line in [*vectors.load(kernel, "integrity-decisions"), {"rules": ""}]:
        if "rules" in line:
            if group:
                yield rules, group
            rules, group = line["rules"], []
        else:
            touched = json.dumps([line["args"], line["audit"]])
            if line["op"] == ON_NODES or ("/mnt/" in touched and "/mnt/fsv" not in touched):
                assert line["enforce"]
                group.append(line)


def root_with(tree: Path, place: Path) -> Path:
    root = place / "root"
    shutil.copytree(tree, root, symlinks=True)
    root.chmod(0o755)
    for name in ("run", "mnt/dmv", "mnt/dmvs", "mnt/ovl", "mnt/ovlt", "mnt/bind"):
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("kernel", "kind", "plain_user"),
    [("linux-6.12", Kind.EXT4, False), ("linux-7.3", Kind.SQUASHFS, os.geteuid() == 0)],
    ids=["linux-6.12", "linux-7.3"],
)
def test_recorded_decisions_on_volumes(kernel: str, kind: Kind, plain_user: bool, tree: Path, tmp_path: Path) -> None:
    root = root_with(tree, tmp_path)
    volume = make_volume(kind, tree / "t", tmp_path)
    volume.hash_image.chmod(0o644)
    signed = volume.option(root / "mnt/dmvs", f"signature={signature(volume.root_hash, tmp_path)}")
    emu = runner(tmp_path, plain_user=plain_user)
    if plain_user:  # who gets no lease of another user's file, and so has no rules read from it
        os.chown(root / "t/ima.pol", UID, UID)
    count = 0
    for rules, group in groups(kernel):
        policy = tmp_path / "boot.pol"
        policy.write_text(f"policy_name=test policy_version=0.0.1\n{rules.replace(RECORDED, volume.root_hash)}")
        with recorder(
            emu, root, "--kernel", kernel, "--boot-policy", str(policy), "--boot-verified", "/", "--boot-verified",
            str(root), "--builtin-keys", str(KEYS / "builtin-trusted.pem"), "--volume",
            volume.option(root / "mnt/dmv"), "--volume", signed, "--cmdline", "ipe.enforce=0 ipe.success_audit=1",
        ) as inside:  # fmt: skip
            for step in group:
                result = inside.run(STEPS[step["op"]], args=step["args"])
                got = [comparable(text, volume) for text in inside.records()]
                want = [normalised(record["text"]) for record in step["audit"]]
                assert (result, got) == (step["result"], want), (step["policy"], step["op"], step["args"])
                count += 1
    assert count == 282


def comparable(text: str, volume: Volume) -> str:
    """A record as the recorded machine would have it: its initramfs is what lies on a file system of this one here."""
    text = normalised(text).replace(volume.root_hash.upper(), RECORDED.upper())
    return re.sub(r'dev="(?!overlay|tmpfs|dm-|ramfs)[^"]*"', 'dev="rootfs"', text)
