"""Initramfs trees for tests, made of a static busybox and scripts; and what a boot of one left behind."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from tests.exec_hook.running import Runner

#: Loads any unsigned policy that a program of the initramfs writes.
BOOT_POLICY = """policy_name=Boot policy_version=0.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=POLICY boot_verified=TRUE action=ALLOW
"""
MOUNTS = """mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t securityfs securityfs /sys/kernel/security
IPE=/sys/kernel/security/ipe
"""
#: A new root on a tmpfs: a copy of busybox, and an init script.
NEW_ROOT = """mount -t tmpfs none /newroot
mkdir -p /newroot/bin /newroot/proc /newroot/sys /newroot/dev
cp /bin/busybox /newroot/bin/busybox
ln -s busybox /newroot/bin/sh
cp /etc/newinit /newroot/init
"""


@frozen
class Booted:
    """What a boot printed, and with which status it ended."""

    status: int
    output: list[str]
    errors: str
    records: list[str]

    def record(self, pattern: str) -> str:
        """The only audit record in which ``pattern`` is found."""
        found = [record for record in self.records if re.search(pattern, record)]
        assert len(found) == 1, (pattern, found, self.records)
        return found[0]


def build_tree(root: Path, init: str, files: Mapping[str, str | bytes] | None = None, *, mode: int = 0o755) -> Path:
    """Make an initramfs directory with busybox, ``/init`` and ``files``."""
    for name in ("bin", "etc", "proc", "sys", "dev", "newroot", "tmp"):
        (root / name).mkdir(parents=True, mode=0o755)
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is missing"
    shutil.copy(busybox, root / "bin/busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=20).stdout
    for name in listed.split():
        if name not in ("busybox", "init", "linuxrc"):
            (root / "bin" / name).symlink_to("busybox")
    contents = {"init": f"#!/bin/sh\nexport PATH=/bin\n{init}", **(files or {})}
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode if name == "init" else 0o755)
    return root


def add_programs(tree: Path, *names: str) -> None:
    """Copy programs of this machine into a tree, with the libraries that they are linked with."""
    for name in names:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program, f"{name} is missing"
        (tree / "usr/sbin").mkdir(parents=True, exist_ok=True)
        shutil.copy(program, tree / "usr/sbin" / name)
        listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=20).stdout
        for library in filter(lambda word: word.startswith("/"), listing.split()):
            target = tree / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
            target.chmod(0o755)


def boot(emu: Runner, tree: Path, *options: str, policy: str | None = BOOT_POLICY, cmdline: str = "") -> Booted:
    """Boot a tree and wait for its end."""
    log = emu.place / "audit.log"
    log.unlink(missing_ok=True)
    arguments = ["--audit-log", str(log), "--timeout", "50", "--cmdline", cmdline]
    if policy is not None:
        (emu.place / "boot.pol").write_text(policy)
        arguments += ["--boot-policy", str(emu.place / "boot.pol")]
    done = emu.run("boot", *arguments, *options, str(tree))
    records = log.read_text().splitlines() if log.exists() else []
    return Booted(done.returncode, done.stdout.splitlines(), done.stderr, records)
