"""Seals belong to inodes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.integrity.fsverity import Parameters, descriptor, measure
from ipe_emu.integrity.seals import Seal, Seals
from ipe_emu.linux.inotify import InodeWatch
from tests.integrity.tools import opened


@pytest.fixture
def seals() -> Iterator[Seals]:
    watch = InodeWatch()
    yield Seals(watch)
    watch.close()


def seal(seals: Seals, path: Path, parameters: Parameters | None = None, signature: bytes = b"") -> Facts:
    parameters = parameters or Parameters()
    with opened(path) as fd:
        made = Seal(parameters, descriptor(fd, parameters), signature)
        seals.add(fd, os.fstat(fd), made)
    return made.facts


def facts_of(seals: Seals, path: Path) -> Facts:
    return seals.facts_of(None, path.stat(), lambda: os.open(path, os.O_RDONLY))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content" * 1000)
    return path


def test_a_sealed_file_has_its_digest_under_every_name(seals: Seals, file: Path) -> None:
    assert not seals
    assert facts_of(seals, file) is NO_FACTS
    with opened(file) as fd:
        digest = measure(fd, "sha512", block_size=1024, salt=b"salt")
    assert seal(seals, file, Parameters("sha512", 1024, b"salt")) == Facts(fsverity_digest=digest)
    os.link(file, file.with_name("link"))
    assert facts_of(seals, file.rename(file.with_name("new"))).fsverity_digest == digest
    assert facts_of(seals, file.with_name("link")).fsverity_digest == digest
    assert seals


def test_a_signature_counts_because_it_was_verified(seals: Seals, file: Path) -> None:
    assert seal(seals, file, signature=b"signature").fsverity_signature
    assert facts_of(seals, file).fsverity_signature


def test_another_content_has_no_facts_and_the_same_again_has_them(seals: Seals, file: Path) -> None:
    facts = seal(seals, file)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    assert facts_of(seals, file) is NO_FACTS
    file.write_bytes(content + b"more")
    assert facts_of(seals, file) is NO_FACTS
    file.write_bytes(content)
    assert facts_of(seals, file) == facts


def test_a_changed_file_that_cannot_be_read_has_no_facts(seals: Seals, file: Path) -> None:
    seal(seals, file)
    file.chmod(0o600)

    def fails() -> int:
        raise PermissionError

    assert seals.facts_of(None, file.stat(), fails) is NO_FACTS


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_another_file_with_the_same_content_is_not_sealed(seals: Seals, file: Path, how: str) -> None:
    """On ext4 it gets the same inode number."""
    facts = seal(seals, file)
    content = file.read_bytes()
    for _ in range(20):
        if how == "unlink":
            file.unlink()
            file.write_bytes(content)
        else:
            file.with_name("new").write_bytes(content)
            file.with_name("new").rename(file)
        assert facts_of(seals, file) is NO_FACTS
        assert seals.of(file.stat()) is None
        assert seal(seals, file) == facts
