"""What the tests of boots share."""

import os
from pathlib import Path

import pytest

from tests.exec_hook.running import Runner, runner

WHO = ("caller", "plain-user", "with-subordinate-ids") if os.geteuid() == 0 else ("caller",)


@pytest.fixture(params=WHO[:2])
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    """Who boots: whoever runs the tests, and, if that is root, a user without privileges as well."""
    return runner(tmp_path, plain_user=request.param != "caller")


@pytest.fixture
def one(tmp_path: Path) -> Runner:
    """Whoever runs the tests, for what does not depend on it."""
    return runner(tmp_path, plain_user=False)
