"""What the tests of the exec hook share."""

from pathlib import Path

import pytest

from tests.exec_hook.tracee_harness import build_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the recorded decisions."""
    return build_tree(tmp_path_factory.mktemp("initramfs"))
