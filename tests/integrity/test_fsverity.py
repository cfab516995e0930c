"""fs-verity digests against values that the program fsverity (1.5, Debian) printed for the same bytes."""

import os
import random
from pathlib import Path

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.integrity.fsverity import measure

FSVERITY_SAID: list[tuple[int, str, int, bytes, str]] = [
    (0, "sha256", 4096, b"", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
    (1, "sha256", 4096, b"", "0edb82071407a15a5898b90f1e04344c59919fe110d15b66d62d9c56525687f5"),
    (4095, "sha256", 4096, b"", "28c1a7d948e415b82109f8370b08e612dac53ebda3d026e27527e17f84e95d9e"),
    (4096, "sha256", 4096, b"", "16ad3fec8e3a330a6ab76a2a77e8887aeca515b046846b723551dae7c76c5141"),
    (4097, "sha256", 4096, b"", "c018eb3d709b7668cc72283bb7f1a785b039f549de3d5526581b08599dc5f128"),
    (
        4097,
        "sha512",
        1024,
        b"salt",
        "115a6c1375c28a07fd9bd93e931d6e26063bbee7018e1828af0aaa8bd053aee94e1080216f4e707a26f758920b6b2a0fed51834f5df2ec9f4b080a17c56b660d",
    ),
    (524288, "sha256", 4096, b"", "9c1ebb6258016ce42ece00219bcce631c6bb8804c70bf4b135e9a3b1a92c1dd2"),
    (524289, "sha256", 4096, b"", "cf3292ef2a818091a16cd982644cd686831129d9f6d4a661201b294c01bef00c"),
    (
        1048576,
        "sha512",
        4096,
        b"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "5cd88f4fb6ca6d5438c7be89709850762b6372bd7c8f6ecded8952b447ea58a9e48057cdcb4f84a22b3661f06b9c3f24ce597cd62d64c06ae06d7d32db4e24d3",
    ),
    (1048577, "sha256", 1024, b"", "726a1567a019e630038b0dbe6a39cd9b68228cf624db510353d33127a83ccf44"),
]


@pytest.mark.parametrize("said", FSVERITY_SAID, ids=lambda said: "-".join(map(str, said[:4])))
def test_digest(tmp_path: Path, said: tuple[int, str, int, bytes, str]) -> None:
    size, algorithm, block_size, salt, digest = said
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert measure(fd, algorithm, block_size=block_size, salt=salt).value.hex() == digest
    finally:
        os.close(fd)


def test_an_algorithm_that_fsverity_lacks() -> None:
    with pytest.raises(KernelError, match="sha1"):
        measure(0, "sha1")
