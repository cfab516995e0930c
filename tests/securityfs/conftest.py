"""Mounts for tests: one emulator for a module whose tests leave no trace in it, and fresh ones."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.securityfs.emulator import Emulator, mounted

Mount = Callable[..., Emulator]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount a fresh emulator: ``mount(*arguments, kernel=...)``; several calls give several mounts."""
    with contextlib.ExitStack() as stack:
        numbers = iter(range(100))

        def start(*arguments: str | Path, kernel: str = "linux-7.3") -> Emulator:
            directory = tmp_path / f"m{next(numbers)}"
            return stack.enter_context(mounted(directory, *arguments, kernel=kernel))

        yield start


@pytest.fixture
def emulator(mount: Mount) -> Emulator:
    """A fresh mount of linux-7.3."""
    return mount()
