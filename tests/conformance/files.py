"""The files that decisions are about: as they are on the initramfs, and again wherever else a machine has them."""

import atexit
import functools
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Those that can be executed, mapped or loaded.
NAMES = ("busybox", "true", "script", "nested", "lost", "garbage", "empty", "dynamic", "plain")


def busybox() -> Path:
    found = shutil.which("busybox")
    assert found is not None, "make setup installs busybox"
    return Path(found)


def fill(directory: Path) -> None:
    """Make ``bin`` with the files in a directory."""
    (directory / "bin").mkdir(parents=True)
    files = {
        "busybox": busybox().read_bytes(),
        "true": b"#!/mnt/initramfs/bin/busybox true\n",
        "script": b"#!/bin/sh\necho a script\n",
        "nested": b"#!/mnt/initramfs/bin/true x\n",
        "lost": b"#!/no/such/interpreter\n",
        "garbage": b"no program at all\n",
        "empty": b"",
        "dynamic": Path("/usr/bin/true").read_bytes(),
        "plain": b"#!/bin/sh\n",
    }
    assert tuple(files) == NAMES
    for name, data in files.items():
        (directory / "bin" / name).write_bytes(data)
        (directory / "bin" / name).chmod(0o644 if name == "plain" else 0o755)


def kept(name: str) -> Path:
    """A directory for what this process makes once; it goes when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix=f"ipe-{name}."))
    atexit.register(shutil.rmtree, directory)
    return directory


def once(make: Callable[[], T]) -> Callable[[], T]:
    """Cache what is made without arguments: made by one thread, others wait for it."""
    lock = threading.Lock()
    cached = functools.cache(make)

    def made() -> T:
        with lock:
            return cached()

    return made
