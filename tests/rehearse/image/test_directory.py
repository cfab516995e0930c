"""A directory as an image."""

import os
import stat
from pathlib import Path

import pytest

from ipe_emu.errors import UserError
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.image.open import Kind, open_image
from tests.rehearse.image.making import look, unpack_images


def test_a_directory_is_unpacked_as_it_is(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"x" * 300_001)
    (tree / "sub" / "file").chmod(0o4711)
    os.link(tree / "sub" / "file", tree / "again")
    (tree / "link").symlink_to("sub/file")
    (tree / os.fsdecode(b"\xff\n")).write_text("odd name")
    os.mkfifo(tree / "fifo")
    with open_image([tree], PROFILES["linux-7.3"]) as image:
        assert image.kind is Kind.DIRECTORY
    result = unpack_images(tmp_path / "rootfs", tree)
    seen = look(tmp_path / "rootfs", result)
    assert (result.fault, result.skipped) == (None, ())
    assert seen[b"/again"] == seen[b"/sub/file"]
    assert seen[b"/again"].links == 2
    assert seen[b"/again"].mode == stat.S_IFREG | 0o4711
    assert seen[b"/link"].content == "sub/file"
    assert b"/\xff\n" in seen
    assert (tmp_path / "rootfs/again").read_bytes() == b"x" * 300_001


@pytest.mark.needs("root")
def test_root_keeps_other_owners(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").touch()
    os.chown(tmp_path / "tree" / "file", 12, 34)
    result = unpack_images(tmp_path / "rootfs", tmp_path / "tree")
    found = look(tmp_path / "rootfs", result)[b"/file"]
    assert (found.uid, found.gid) == (12, 34)


def test_a_file_that_cpio_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree" / "large").open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(UserError, match="'large' in the directory cannot be packed"):
        unpack_images(tmp_path / "rootfs", tmp_path / "tree")
