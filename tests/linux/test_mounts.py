import os
from pathlib import Path

import pytest

from ipe_emu.linux import mounts, namespaces
from ipe_emu.linux.mounts import Attribute, MountInfo
from ipe_emu.linux.namespaces import Namespace


@pytest.mark.parametrize(
    ("line", "info"),
    [
        (
            b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
            MountInfo(36, 35, os.makedev(98, 0), b"/mnt1", b"/mnt2", b"ext3", b"/dev/root"),
        ),
        (
            b"1 2 0:30 / /a\\040b\\134\\012\\303\\244 rw - fuse.securityfs none\\011x rw",
            MountInfo(1, 2, 30, b"/", b"/a b\\\n\xc3\xa4", b"fuse.securityfs", b"none\tx"),
        ),
        (
            b"1 2 0:30 / / rw shared:1 master:2 propagate_from:3 unbindable - tmpfs  rw",
            MountInfo(1, 2, 30, b"/", b"/", b"tmpfs", b""),
        ),
    ],
)
def test_mountinfo(line: bytes, info: MountInfo) -> None:
    assert mounts.parse_mountinfo(line) == info


def test_what_is_mounted_here() -> None:
    root = mounts.mount_at(Path("/"))
    assert root.device == Path("/").stat().st_dev
    assert root in mounts.mounts()
    assert mounts.mount_at(b"/proc").kind == b"proc"
    with pytest.raises(FileNotFoundError):
        mounts.mount_at(Path("/proc/self"))


def in_mount_namespace(script: str, place: Path) -> str:
    """Run a function of this module in a child with a mount namespace that is its to change; what it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() != 0:
                uid, gid = os.getuid(), os.getgid()
                namespaces.unshare(Namespace.USER)
                ids = namespaces.IdMap(
                    (namespaces.IdRange(0, uid, 1),), (namespaces.IdRange(0, gid, 1),), setgroups=False
                )
                namespaces.write_maps("self", ids)
            namespaces.unshare(Namespace.MOUNT)
            mounts.make_private()
            os.write(writer, str(globals()[script](place)).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


def _attach_a_tmpfs(place: Path) -> object:
    tmpfs = mounts.new_filesystem(b"tmpfs", {b"source": b"here", b"mode": b"700"}, Attribute.NOEXEC)
    mounts.attach(tmpfs, place)
    os.close(tmpfs)
    (place / "file").write_text("x")
    found = mounts.mount_at(place)
    return found.kind, found.source, oct(place.stat().st_mode & 0o777)


def _clone_read_only(place: Path) -> object:
    (place / "a").mkdir()
    (place / "a" / "file").write_text("x")
    tree = mounts.clone(place / "a", recursive=True)
    mounts.set_attributes(tree, Attribute.RDONLY)
    mounts.attach(tree, place / "a")
    os.close(tree)
    try:
        (place / "a" / "file").write_text("y")
    except OSError as error:
        return error.errno, (place / "a" / "file").read_text()
    return "written"


def _fail(_place: Path) -> object:
    try:
        mounts.new_filesystem(b"tmpfs", {b"size": b"nonsense"})
    except OSError as error:
        return error.errno, error.strerror
    return "made"


def _pivot(place: Path) -> object:
    tmpfs = mounts.new_filesystem(b"tmpfs", {})
    mounts.attach(tmpfs, place)
    os.close(tmpfs)
    (place / "only").mkdir()
    mounts.pivot_root_into(place)
    return [path.name for path in Path("/").iterdir()], str(Path.cwd())


@pytest.mark.needs("user-namespaces")
@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("_attach_a_tmpfs", "(b'tmpfs', b'here', '0o700')"),
        ("_clone_read_only", "(30, 'x')"),
        ("_pivot", "(['only'], '/')"),
    ],
)
def test_mounting(script: str, result: str, tmp_path: Path) -> None:
    assert in_mount_namespace(script, tmp_path) == result
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.needs("user-namespaces")
def test_an_error_says_what_the_file_system_said(tmp_path: Path) -> None:
    said = in_mount_namespace("_fail", tmp_path)
    assert said.startswith("(22, ")
    assert "mounting tmpfs: tmpfs: Bad value for 'size'" in said.replace("\\'", "'")
