"""What is there after unpacking, and what the kernel silently leaves out."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu.rehearse.image.rootfs import DeviceNode, Skipped, Unpacked
from tests.rehearse.image.making import DIRECTORY, FILE, LINK, TOOLS, TRAILER, compress, look, member, unpack_images
from tests.rootless import UID, as_plain_user

ROOT = Path(__file__).parents[3]
CONSOLE = DeviceNode((b"/dev/console",), stat.S_IFCHR | 0o600, 0, 0, 5, 1)


def unpacked(tmp_path: Path, *members: bytes) -> tuple[Path, Unpacked]:
    image = tmp_path / "image"
    image.write_bytes(b"".join(members) + TRAILER)
    return tmp_path / "rootfs", unpack_images(tmp_path / "rootfs", image)


@pytest.mark.needs("root")
def test_owners_modes_times_and_types(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path,
        member(b"bin", DIRECTORY | 0o1000, uid=1, gid=2, mtime=11),
        member(b"bin/su", stat.S_IFREG | 0o4755, b"#!", uid=3, gid=4, mtime=12),
        member(b"bin/sh", LINK, b"su", uid=5, gid=6, mtime=13),
        member(b"pipe", stat.S_IFIFO | 0o622, uid=7, mtime=14),
        member(b"socket", stat.S_IFSOCK | 0o600, mtime=15),
    )
    assert (result.skipped, result.differences, result.fault, result.nodes) == ((), (), None, (CONSOLE,))
    assert result.entries == 5
    seen = look(root, result)
    assert set(seen) == {b"/" + name for name in b"|bin|bin/su|bin/sh|pipe|socket|dev|dev/console|root".split(b"|")}
    assert (seen[b"/bin"].mode, seen[b"/bin"].uid, seen[b"/bin"].gid, seen[b"/bin"].mtime) == (0o41755, 1, 2, 11)
    assert (seen[b"/bin/su"].mode, seen[b"/bin/su"].uid, seen[b"/bin/su"].gid) == (0o104755, 3, 4)
    assert seen[b"/bin/su"].mtime == 12
    assert (seen[b"/bin/sh"].content, seen[b"/bin/sh"].uid, seen[b"/bin/sh"].mtime) == ("su", 5, 13)
    assert (seen[b"/pipe"].mode, seen[b"/pipe"].uid, seen[b"/pipe"].mtime) == (0o10622, 7, 14)
    assert seen[b"/socket"].mode == 0o140600


def test_device_nodes_are_values_with_all_their_names(tmp_path: Path) -> None:
    _, result = unpacked(
        tmp_path,
        member(b"dev/null", stat.S_IFCHR | 0o666, rdev=(1, 3), nlink=2, ino=5, uid=9),
        member(b"dev/sda", stat.S_IFBLK | 0o660, rdev=(8, 300), gid=6),
        member(b"nothing", stat.S_IFCHR | 0o666, rdev=(1, 3), nlink=2, ino=5),
        member(b"gone", stat.S_IFCHR | 0o666, rdev=(1, 5)),
        member(b"gone", FILE, b"a file instead"),
    )
    assert set(result.nodes) == {
        CONSOLE,
        DeviceNode((b"/dev/null", b"/nothing"), stat.S_IFCHR | 0o666, 9, 0, 1, 3),
        DeviceNode((b"/dev/sda",), stat.S_IFBLK | 0o660, 0, 6, 8, 300),
    }


def test_a_device_node_is_found_where_a_link_on_its_way_is_gone(tmp_path: Path) -> None:
    _, result = unpacked(
        tmp_path,
        member(b"d", DIRECTORY),
        member(b"l", LINK, b"/d"),
        member(b"l/node", stat.S_IFCHR | 0o600, rdev=(1, 3)),
        member(b"l", FILE),
    )
    assert DeviceNode((b"/d/node",), stat.S_IFCHR | 0o600, 0, 0, 1, 3) in result.nodes


@pytest.mark.parametrize("with_data", [0, 1, 2])
def test_the_data_of_hard_links_may_be_with_any_of_them(tmp_path: Path, with_data: int) -> None:
    members = [
        member(name, FILE, b"data" if number == with_data else b"", ino=7, nlink=3)
        for number, name in enumerate((b"a", b"b", b"c"))
    ]
    root, _ = unpacked(tmp_path, *members)
    assert {(root / name).read_bytes() for name in "abc"} == {b"data"}
    assert len({(root / name).stat().st_ino for name in "abc"}) == 1


def test_hard_links_do_not_reach_across_the_end_of_an_archive(tmp_path: Path) -> None:
    one, other = (member(name, FILE, name, ino=7, nlink=2) for name in (b"a", b"b"))
    root, _ = unpacked(tmp_path, one, TRAILER, other)
    assert [(root / name).read_bytes() for name in "ab"] == [b"a", b"b"]


def test_a_hard_linked_file_that_comes_twice_is_gone(tmp_path: Path) -> None:
    one = member(b"a", FILE, b"data", ino=7, nlink=2)
    root, result = unpacked(tmp_path, one, one)
    assert not (root / "a").exists()
    assert result.skipped == (Skipped(b"a", errno.ENOENT),)


def test_what_comes_later_replaces_what_was_there(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path,
        member(b"usr", DIRECTORY),
        member(b"bin", LINK, b"usr"),
        member(b"bin/tool", FILE, b"through the link"),
        member(b"bin", DIRECTORY),
        member(b"bin/tool", FILE, b"in the directory"),
        member(b"file", FILE, b"a longer text"),
        member(b"file", FILE, b"short"),
        member(b"full", DIRECTORY),
        member(b"full/x", FILE),
        member(b"full", FILE, b"not possible"),
        member(b"empty", DIRECTORY),
        member(b"empty", LINK, b"x"),
    )
    assert (root / "usr/tool").read_bytes() == b"through the link"
    assert not (root / "bin").is_symlink()
    assert (root / "bin/tool").read_bytes() == b"in the directory"
    assert (root / "file").read_bytes() == b"short"
    assert (root / "full").is_dir()
    assert (root / "empty").is_symlink()
    assert result.skipped == (Skipped(b"full", errno.EISDIR),)


def test_a_file_without_its_directory_is_not_there_and_nobody_says_so(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path,
        member(b"lib/x.so", FILE, b"x"),
        member(b"lib", DIRECTORY),
        member(b"lib/y.so", FILE),
        member(b"n" * 256),
    )
    assert sorted(path.name for path in (root / "lib").iterdir()) == ["y.so"]
    assert result.skipped == (Skipped(b"lib/x.so", errno.ENOENT), Skipped(b"n" * 256, errno.ENAMETOOLONG))
    assert "the kernel says nothing: ENOENT" in str(result.skipped[0])


def test_a_cut_file_has_its_size_and_zeros(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(member(b"a", FILE, b"x" * 100)[:-60])
    result = unpack_images(tmp_path / "rootfs", tmp_path / "image")
    assert (tmp_path / "rootfs" / "a").read_bytes() == b"x" * 40 + bytes(60)
    assert (result.fault, result.cut) == (None, b"a")


def test_nothing_leaves_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("safe")
    root, result = unpacked(
        tmp_path,
        member(b"../up", FILE, b"1"),
        member(b"../../../../../../etc", DIRECTORY),
        member(b"..", DIRECTORY | 0o2),
        member(b"/absolute", FILE, b"2"),
        member(os.fsencode(outside / "victim"), FILE, b"3"),
        member(b"climb", LINK, b"../outside"),
        member(b"climb/victim", FILE, b"4"),
        member(b"jump", LINK, os.fsencode(outside)),
        member(b"jump/victim", FILE, b"5"),
        member(b"jump/victim", DIRECTORY),
        member(b"proc", LINK, b"/proc/self/root"),
        member(b"proc/etc/x", FILE, b"6"),
        member(b"link", FILE, ino=1, nlink=2),
        member(b"jump/victim", FILE, ino=1, nlink=2),
    )
    assert (outside / "victim").read_text() == "safe"
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "outside", "rootfs"]
    assert (root / "up").read_bytes() == b"1"
    assert (root / "etc").is_dir()
    assert (root / "absolute").read_bytes() == b"2"
    assert {skip.errno for skip in result.skipped} <= {errno.ENOENT, errno.ELOOP}


@pytest.mark.parametrize(
    "tool", [["cpio", "-o", "-H", "newc"], ["cpio", "-o", "-H", "crc"], ["bsdcpio", "-o", "-H", "newc"]]
)
def test_what_real_tools_pack(tmp_path: Path, tool: list[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "usr/bin/busybox")
    (tree / "bin").symlink_to("usr/bin")
    os.link(tree / "usr/bin/busybox", tree / "usr/bin/sh")
    (tree / ("long" * 50)).write_text("x")
    os.mkfifo(tree / "fifo")
    names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    packed = subprocess.run(
        tool, cwd=tree, input=names, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=60
    ).stdout
    (tmp_path / "image").write_bytes(compress(TOOLS["zstd"], packed))
    result = unpack_images(tmp_path / "rootfs", tmp_path / "image")
    assert (result.fault, result.skipped) == (None, ())
    root = tmp_path / "rootfs"
    for path in tree.rglob("*"):
        copy = root / path.relative_to(tree)
        assert (copy.lstat().st_mode, copy.lstat().st_mtime_ns) == (
            path.lstat().st_mode, int(path.lstat().st_mtime) * 10**9,
        )  # fmt: skip
        if path.is_file():
            assert copy.read_bytes() == path.read_bytes()
    assert (root / "bin/sh").samefile(root / "usr/bin/busybox")


@pytest.mark.needs("root")
def test_owners_that_a_plain_user_cannot_give_are_said(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "image").write_bytes(member(b"a", uid=1, gid=2) + member(b"b", uid=1, gid=2) + TRAILER)
    os.chown(place, UID, UID)
    program = (
        "import sys; from pathlib import Path; from tests.rehearse.image.making import unpack_images;"
        "u = unpack_images(Path(sys.argv[1]), Path(sys.argv[2])); print(*u.differences, sep='\\n')"
    )
    done = subprocess.run(
        as_plain_user(
            [sys.executable, "-c", program, str(place / "rootfs"), str(place / "image")], place, fuse=False
        ),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "b'a': its owner 1:2 does not exist here; more may have this one" in done.stdout.splitlines()
