"""Holding inodes, on the file systems that this machine has at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.linux.inotify import InodeWatch


@pytest.fixture
def watch() -> Iterator[InodeWatch]:
    watch = InodeWatch()
    yield watch
    watch.close()


@pytest.fixture(params=["tmp", "shm"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "tmp":
        yield tmp_path
        return
    here = Path("/dev/shm", f"ipe-emu-{os.getpid()}")
    here.mkdir()
    yield here
    for path in here.iterdir():
        path.unlink()
    here.rmdir()


def held(watch: InodeWatch, path: Path) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        return watch.hold(fd)
    finally:
        os.close(fd)


def test_nothing_is_held_at_first(watch: InodeWatch) -> None:
    assert watch.ended() == set()


def test_a_deleted_inode_is_told_once(watch: InodeWatch, place: Path) -> None:
    (place / "a").touch()
    (place / "b").touch()
    a, b = held(watch, place / "a"), held(watch, place / "b")
    assert a != b
    (place / "a").unlink()
    assert watch.ended() == {a}
    assert watch.ended() == set()


def test_what_changes_other_than_by_deletion_is_not_told(watch: InodeWatch, place: Path) -> None:
    (place / "a").touch()
    held(watch, place / "a")
    (place / "a").write_bytes(b"x")
    (place / "a").chmod(0o600)
    (place / "a").rename(place / "b")
    os.link(place / "b", place / "c")
    (place / "b").unlink()
    assert watch.ended() == set()


def test_an_open_file_lives_on_without_a_name(watch: InodeWatch, place: Path) -> None:
    (place / "a").touch()
    name = held(watch, place / "a")
    fd = os.open(place / "a", os.O_RDONLY)
    (place / "a").unlink()
    assert watch.ended() == set()
    os.close(fd)
    assert watch.ended() == {name}


def test_a_replaced_file_is_gone(watch: InodeWatch, place: Path) -> None:
    (place / "a").touch()
    name = held(watch, place / "a")
    (place / "b").touch()
    (place / "b").rename(place / "a")
    assert watch.ended() == {name}


def test_a_number_is_given_to_another_only_after_it_was_told(watch: InodeWatch, place: Path) -> None:
    """Where it is given to another at all, as on ext4, that happens at once."""
    for _ in range(50):
        (place / "a").touch()
        number = (place / "a").stat().st_ino
        name = held(watch, place / "a")
        (place / "a").unlink()
        (place / "a").touch()
        told = watch.ended()
        assert (place / "a").stat().st_ino != number or name in told
        assert name in told
        (place / "a").unlink()


def test_more_than_can_be_told_at_once_is_told(watch: InodeWatch, place: Path) -> None:
    names = set()
    for number in range(600):
        (place / str(number)).touch()
        names.add(held(watch, place / str(number)))
    for number in range(600):
        (place / str(number)).unlink()
    assert watch.ended() == names


def test_events_that_were_lost_end_everything(watch: InodeWatch, place: Path) -> None:
    """The queue is as long as the machine's administrator lets it be: 16,384 where nobody changed that."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (place / "a").touch()
    name = held(watch, place / "a")
    for _ in range(min(limit, 16384) + 1):
        (place / "b").touch()
        held(watch, place / "b")
        (place / "b").unlink()
    assert (name in watch.ended()) == (limit <= 16384)
