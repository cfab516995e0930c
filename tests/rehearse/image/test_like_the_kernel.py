"""The same images, the same trees and the same messages as recorded on real kernels (tests/vectors/README.md)."""

import base64
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from ipe_emu.errors import NotJudgedError
from tests import vectors
from tests.rehearse.image.making import DIRECTORY, FILE, TRAILER, Seen, look, member, unpack_images

#: What stood before the random part when it was recorded: the programs that listed the rest.
_LISTERS = (b"/bin", b"/bin/busybox", b"/init")
_PREFIX = member(b"bin", DIRECTORY) + member(b"bin/busybox", FILE) + member(b"init", FILE) + TRAILER


def files_of(vector: dict[str, Any]) -> dict[bytes, Seen]:
    """The recorded tree; a time of 0 stands for one that the archive does not give."""
    return {
        name.encode("latin-1"): Seen(mode, uid, gid, links, mtime or 0, (rdev[0], rdev[1]), content)
        for name, (mode, uid, gid, links, mtime, rdev, content) in vector["files"].items()
    }


@pytest.mark.needs("root")
@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_recorded_images(tmp_path: Path, kernel: str) -> None:
    judged = 0
    for number, vector in enumerate(vectors.load(kernel, "initramfs")):
        image = tmp_path / "image"
        image.write_bytes(_PREFIX.ljust(1024, b"\0") + base64.b64decode(vector["image"]))
        root = tmp_path / str(number)
        try:
            result = unpack_images(root, image, kernel=kernel)
        except NotJudgedError:
            continue
        message = result.fault.message if result.fault is not None else None
        if result.differences or (result.fault is not None and not result.fault.exact):
            # Said to be unlike the kernel's: never where the kernel found nothing wrong.
            assert result.differences or vector["message"], number
            continue
        judged += 1
        assert message == vector["message"], f"{kernel} {number}: {result.fault}"
        theirs = files_of(vector)
        ours = {
            name: seen if name not in theirs or theirs[name].mtime else evolve(seen, mtime=0)
            for name, seen in look(root, result).items()
            if name not in _LISTERS
        }
        assert ours == theirs, f"{kernel} {number}"
    assert judged > 180
