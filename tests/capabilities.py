"""What a machine must have for some tests, probed and never guessed; and which lacks CI accepts.

A test that needs one says ``@pytest.mark.needs("device-mapper")``. Its skip then bears the reason given here, word for
word, and CI compares reasons word for word: a skip for any other reason fails it.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ipe_emu.errors import CannotEmulateError
from ipe_emu.rehearse.cgroups import own_group

NO_DEVICE_MAPPER = "no device-mapper on this machine: /dev/mapper/control cannot be opened"
NO_FSVERITY = "no fs-verity on this machine: its kernel has no /proc/sys/fs/verity"
NO_FUSE = "no FUSE on this machine: /dev/fuse cannot be opened, or fusermount3 is not installed"
NO_USER_NAMESPACES = "no user namespaces on this machine: unshare -Ur fails"
NO_CGROUPS = "no group can be made on this machine in a hierarchy of cgroups of version 2"
NO_PACKAGES = "no Debian packages for an initramfs: apt-get does not know them, or cannot download them"
NO_BUSYBOX = "no static busybox on this machine"
NOT_ROOT = "not root"

#: The only reasons for which CI may skip a test.
ALLOWED_IN_CI = frozenset({NO_DEVICE_MAPPER, NO_FSVERITY, NO_CGROUPS, NO_PACKAGES})


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _makes_groups() -> bool:
    try:
        group = own_group() / f"ipe-emu-probe-{os.getpid()}"
        group.mkdir()
        group.rmdir()
    except (CannotEmulateError, OSError):
        return False
    return True


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


_PROBES: dict[str, tuple[Callable[[], bool], str]] = {
    "device-mapper": (lambda: _opens("/dev/mapper/control"), NO_DEVICE_MAPPER),
    "fs-verity": (lambda: Path("/proc/sys/fs/verity").is_dir(), NO_FSVERITY),
    "fuse": (lambda: _opens("/dev/fuse") and shutil.which("fusermount3") is not None, NO_FUSE),
    "user-namespaces": (lambda: _succeeds("unshare", "-Ur", "true"), NO_USER_NAMESPACES),
    "cgroups": (_makes_groups, NO_CGROUPS),
    "busybox": (lambda: _succeeds("busybox", "true"), NO_BUSYBOX),
    "root": (lambda: os.geteuid() == 0, NOT_ROOT),
}


@cache
def missing(capability: str) -> str | None:
    """The reason why ``capability`` is not there, or None if it is. KeyError for an unknown name."""
    probe, reason = _PROBES[capability]
    return None if probe() else reason
