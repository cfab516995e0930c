"""Hostile images by the thousand: each has one of the documented outcomes, and none leaves its root."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.image.compression import Limits
from ipe_emu.rehearse.image.open import open_image
from tests.rehearse.image.making import DIRECTORY, LINK, REFUSED, TOOLS, TRAILER, compress, member, unpack_images
from tests.rehearse.image.random_images import random_image

_TREE = member(b"d", DIRECTORY) + member(b"d/f", data=b"0123456789" * 300) + member(b"l", LINK, b"d") + TRAILER


@pytest.mark.parametrize("kind", [*TOOLS, *REFUSED])
def test_damaged_streams(tmp_path: Path, kind: str) -> None:
    choice = random.Random(kind)
    whole = compress(TOOLS[kind] if kind in TOOLS else REFUSED[kind][0], _TREE)
    path = tmp_path / "image"
    outcomes: Counter[str] = Counter()
    times = 60 if kind.startswith("lzo") else 300  # a process each
    for _ in range(times):
        data = bytearray(whole)
        for _ in range(choice.choice([0, 1, 1, 4])):
            data[choice.randrange(len(data))] = choice.randrange(256)
        path.write_bytes(bytes(data[: choice.choice([len(data), choice.randrange(1, len(data))])]))
        try:
            with open_image([path], PROFILES["linux-7.3"], limits=Limits(unpacked=64 << 20)) as image:
                for _ in image.members:
                    assert sum(map(len, image.members.data())) <= 64 << 20
                outcomes["whole" if image.members.fault is None else "fault"] += 1
        except (NotJudgedError, UserError):
            outcomes["refused"] += 1
    assert outcomes["fault"] > times // 3
    assert outcomes.total() == times


def test_random_images(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = tmp_path / "image"
    faults = 0
    for seed in range(100):
        path.write_bytes(random_image(10_000 + seed, _TREE))
        root = tmp_path / "inside" / "rootfs"
        try:
            faults += unpack_images(root, path, kernel=("linux-6.12", "linux-7.3")[seed % 2]).fault is not None
        except (NotJudgedError, UserError):
            faults += 1
        assert [path.name for path in (tmp_path / "inside").iterdir()] == ["rootfs"]
        shutil.rmtree(root)
    assert 10 < faults < 90
