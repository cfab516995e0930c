"""Trees against a plain reference, and the hashing of files by one process and by several."""

import contextlib
import errno
import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipe_emu.errors import KernelError
from ipe_emu.integrity import hash_workers
from ipe_emu.integrity.block_hashes import BlockHasher
from ipe_emu.integrity.hash_workers import hash_file
from ipe_emu.integrity.merkle import Shape, TreeBuilder
from tests.integrity.tools import opened

MIB = 1 << 20
SHAPE = Shape(hash_block_size=20, slot_size=4, per_block=4)


def short_hash(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:4]


def reference(digests: list[bytes]) -> tuple[bytes, dict[tuple[int, int], bytes]]:
    """The root and every block of a tree, each level made from the one below at once."""
    blocks: dict[tuple[int, int], bytes] = {}
    level = 0
    while len(digests) > 1:
        groups = [digests[i : i + SHAPE.per_block] for i in range(0, len(digests), SHAPE.per_block)]
        filled = [b"".join(group).ljust(SHAPE.hash_block_size, b"\0") for group in groups]
        blocks |= {(level, number): block for number, block in enumerate(filled)}
        digests = [short_hash(block) for block in filled]
        level += 1
    return digests[0], blocks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=8), st.booleans())
def test_a_tree_is_what_its_levels_are(runs: list[tuple[int, int]], as_runs: bool) -> None:
    written: dict[tuple[int, int], bytes] = {}

    def write(level: int, first: int, block: bytes, repeat: int) -> None:
        for number in range(first, first + repeat):
            assert (level, number) not in written
            written[level, number] = block

    builder = TreeBuilder(SHAPE, short_hash, write)
    digests = []
    for value, count in runs:
        slot = bytes([value]) * 4
        digests += [slot] * count
        if as_runs:
            builder.add(slot, count)
        else:
            builder.add(slot * count)
    root, blocks = reference(digests)
    assert (builder.root(), written) == (root, blocks)
    sizes = SHAPE.level_sizes(len(digests))
    assert set(blocks) == {(level, n) for level, size in enumerate(sizes) for n in range(size)}


def test_a_tree_of_nothing() -> None:
    with pytest.raises(ValueError, match="no data"):
        TreeBuilder(SHAPE, short_hash).root()


def test_equal_blocks_cost_nothing() -> None:
    many = 1 << 50
    start = time.monotonic()
    builder = TreeBuilder(SHAPE, short_hash)
    builder.add(b"abcd", many)
    builder.root()
    assert time.monotonic() - start < 5


def hasher(block_size: int = 4096, prefix: bytes = b"salt") -> BlockHasher:
    return BlockHasher("sha256", None, block_size, 32, prefix, b"")


def digests(path: Path, jobs: int, *, count: int | None = None) -> bytes:
    blocks = path.stat().st_size // 4096 if count is None else count
    with opened(path) as fd, closing(hash_file(fd, hasher(), blocks, jobs=jobs)) as found:
        return b"".join(part.slots * part.repeat for part in found)


def plain_digests(path: Path) -> bytes:
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(b"salt" + block).digest() for block in iter(lambda: file.read(4096), b""))


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    """40 MiB: data, holes large and small, at block boundaries and across them, data of zeros, a hole at the end."""
    path = tmp_path / "holes"
    rng = random.Random(1)
    with path.open("wb") as file:
        for offset, length in (
            (0, 3 * MIB + 100), (9 * MIB - 1, 2), (20 * MIB, 4096), (20 * MIB + 8192, 5 * MIB), (30 * MIB + 5, 7000)
        ):  # fmt: skip
            file.seek(offset)
            file.write(rng.randbytes(length))
        file.seek(32 * MIB)
        file.write(bytes(2 * MIB))
        file.truncate(40 * MIB)
    return path


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_holes_are_zeros(holes: Path, jobs: int) -> None:
    assert digests(holes, jobs) == plain_digests(holes)


def test_a_large_hole_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 1 << 40)
    with opened(path) as fd:
        tasks = list(hash_file(fd, hasher(), 1 << 28, jobs=2))
    assert len(tasks) == 1
    assert tasks[0].repeat == 1 << 28


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_that_is_cut_meanwhile(tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "cut"
    path.write_bytes(b"x" * (33 * MIB))
    with pytest.raises(KernelError, match="shorter"):
        digests(path, jobs, count=34 * MIB // 4096)


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_worker_that_is_killed_is_an_error_and_none_is_left(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * (64 * MIB))
    before = children()
    with opened(path) as fd, closing(hash_file(fd, hasher(), 64 * MIB // 4096, jobs=2)) as found:
        next(found)
        workers = children() - before
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(KernelError, match="ended with status -9"):
            list(found)
    assert children() == before


def test_who_stops_early_leaves_no_worker(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * (64 * MIB))
    before = children()
    with opened(path) as fd, closing(hash_file(fd, hasher(), 64 * MIB // 4096, jobs=2)) as found:
        next(found)
    assert children() == before


def test_reading_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(random.Random(2).randbytes(MIB))
    expected = plain_digests(path)
    real = os.preadv
    pieces: Iterator[int] = iter(random.Random(3).choices(range(1, 9000), k=10_000))

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        left = next(pieces)
        few = []
        for buffer in buffers:
            few.append(buffer[:left])
            left -= len(few[-1])
            if not left:
                break
        return real(fd, few, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert digests(path, 1) == expected


def test_progress_adds_up(holes: Path) -> None:
    done: list[int] = []
    with (
        opened(holes) as fd,
        contextlib.closing(hash_file(fd, hasher(), 40 * MIB // 4096, jobs=2, progress=done.append)) as found,
    ):
        for _ in found:
            pass
    assert sum(done) == 40 * MIB
    assert max(done) <= 20 * MIB
    assert hash_workers.TASK_BYTES in done


def test_without_workers_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(random.Random(4).randbytes(33 * MIB))
    expected = digests(path, 2)
    before = children()
    real = subprocess.Popen
    started: list[object] = []

    def popen(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(real(*arguments, **options))
        return started[0]  # type: ignore[return-value]  # a list of one kind

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert digests(path, 2) == expected
    assert len(started) == 1
    assert children() == before
