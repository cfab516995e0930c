"""Where files lie, seen through bind mounts, other mount namespaces and changed root directories."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu.linux import mountinfo, procfs


def mount_of(path: str) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        return procfs.mount_id("self", fd)
    finally:
        os.close(fd)


def test_a_superblock_is_named_after_its_type_or_device() -> None:
    device = Path("/proc").stat().st_dev
    assert mountinfo.superblock_name(os.getpid(), mount_of("/proc"), device) == "proc"
    assert mountinfo.superblock_name(os.getpid(), 1 << 30, device) == "proc", "by any mount of that file system"
    assert mountinfo.superblock_name(os.getpid(), 1 << 30, 0) is None


def test_where_a_file_lies(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    found = mountinfo.locate(os.fsencode(file))
    below = os.fsencode(file.name)
    assert found.path.endswith(b"/" + below)
    assert found == mountinfo.location(os.getpid(), mount_of(str(tmp_path)), os.fsencode(file))
    assert mountinfo.location(os.getpid(), 1 << 30, os.fsencode(file)) is None


@pytest.mark.needs("root")
def test_a_place_is_the_same_through_every_mount(tmp_path: Path) -> None:
    """A process that has another root directory and a mount namespace of its own still uses the same file."""
    (tmp_path / "data dir/below").mkdir(parents=True)
    (tmp_path / "data dir/below/file").touch()
    (tmp_path / "bind").mkdir()
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from ipe_emu.linux import mountinfo, mounts, namespaces, procfs\n"
        "top = Path(sys.argv[1])\n"
        "expected = mountinfo.locate(os.fsencode(top / 'data dir/below/file')).path\n"
        "namespaces.unshare(namespaces.Namespace.MOUNT)\n"
        "mounts.make_private()\n"
        "mounts.attach(mounts.clone(top / 'data dir/below', recursive=False), top / 'bind')\n"
        "bound = mountinfo.locate(os.fsencode(top / 'bind/file'))\n"
        "assert (bound.path, bound.mount_root) == (expected, os.path.dirname(expected)), bound\n"
        "chrooted, ready = os.pipe()\n"
        "end, stay = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(stay)\n"
        "    os.chroot(top)\n"
        "    os.write(ready, b'x')\n"
        "    os.read(end, 1)\n"
        "    os._exit(0)\n"
        "os.read(chrooted, 1)\n"
        "for name in ('data dir/below/file', 'bind/file'):\n"
        "    path = os.fsencode(top / name)\n"
        "    fd = os.open(path, os.O_PATH)\n"
        "    found = mountinfo.location(child, procfs.mount_id('self', fd), path)\n"
        "    assert found is not None and found.path == expected, (name, found)\n"
    )
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", program, str(tmp_path), str(root), str(root / "fs")]
    subprocess.run(command, check=True, timeout=60)
