"""Where files lie, seen through bind mounts, other mount namespaces and changed root directories."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu.linux import mountinfo, statx
from ipe_emu.linux.mountinfo import OF_THIS_MACHINE, Superblocks


def mount_of(path: str) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        return statx.mount_id(fd)
    finally:
        os.close(fd)


def test_a_superblock_is_named_after_its_type_or_device() -> None:
    device = Path("/proc").stat().st_dev
    assert OF_THIS_MACHINE.name_of(os.getpid(), mount_of("/proc"), device) == "proc"
    assert OF_THIS_MACHINE.name_of(os.getpid(), 1 << 30, device) == "proc", "by any mount of that file system"
    assert OF_THIS_MACHINE.name_of(os.getpid(), 1 << 30, 0) is None


def test_a_superblock_that_stands_for_another_has_its_name() -> None:
    status = Path("/proc").stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    machine = Superblocks(names={device: "dm-0"})
    assert machine.name_of(os.getpid(), mount_of("/proc"), status.st_dev) == "dm-0"
    assert machine.name_of(os.getpid(), 1 << 30, status.st_dev) == "dm-0"


def test_a_mount_that_nobody_sees_can_be_known(tmp_path: Path) -> None:
    hidden = mountinfo.MountEntry(1 << 30, "0:999", b"/", b"/", "tmpfs", b"rootfs")
    machine = Superblocks({"0:999": "rootfs"}, {hidden.id: hidden})
    assert machine.name_of(os.getpid(), hidden.id, 0) == "rootfs"
    assert machine.location(os.getpid(), hidden.id, b"/bin/sh") == mountinfo.Location(
        "0:999", b"/bin/sh", b"/", hidden.kind
    )


def test_where_a_file_lies(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    found = mountinfo.locate(os.fsencode(file))
    below = os.fsencode(file.name)
    assert found.path.endswith(b"/" + below)
    assert found == OF_THIS_MACHINE.location(os.getpid(), mount_of(str(tmp_path)), os.fsencode(file))
    assert OF_THIS_MACHINE.location(os.getpid(), 1 << 30, os.fsencode(file)) is None


@pytest.mark.needs("root")
def test_a_place_is_the_same_through_every_mount(tmp_path: Path) -> None:
    """A process that has another root directory and a mount namespace of its own still uses the same file."""
    (tmp_path / "data dir/below").mkdir(parents=True)
    (tmp_path / "data dir/below/file").touch()
    (tmp_path / "bind").mkdir()
    program = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from ipe_emu.linux import mountinfo, mounts, namespaces, statx\n"
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
        "    found = mountinfo.OF_THIS_MACHINE.location(child, statx.mount_id(fd), path)\n"
        "    assert found is not None and found.path == expected, (name, found)\n"
    )
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", program, str(tmp_path), str(root), str(root / "fs")]
    subprocess.run(command, check=True, timeout=60)
