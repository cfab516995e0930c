"""The rules that conftest.py holds every test to, tried on tests that break them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capabilities import ALLOWED_IN_CI, NO_DEVICE_MAPPER, NO_FSVERITY, NO_FUSE

ROOT = Path(__file__).parent.parent


def run_pytest(directory: Path, source: str, *, ci: bool) -> tuple[int, str]:
    """Run one file of tests under the conftest of this project."""
    (directory / "test_it.py").write_text(source)
    (directory / "empty.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | (
        {"CI": "true"} if ci else {}
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", directory / "empty.ini",
         "-p", "no:cacheprovider", "--basetemp", directory / "base", directory],
        capture_output=True, text=True, env=environment, cwd=directory, timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def skips(reason: str) -> str:
    """A file with a test that is marked as skipped, and one that skips itself."""
    return (
        "import pytest\n"
        "def test_good(): pass\n"
        f"@pytest.mark.skip(reason={reason!r})\n"
        "def test_marked(): pass\n"
        f"def test_called(): pytest.skip({reason!r})\n"
    )


@pytest.mark.parametrize("reason", [NO_FUSE, f"{NO_FSVERITY}?", "unconditional skip"])
def test_ci_refuses_a_skip(tmp_path: Path, reason: str) -> None:
    assert reason not in ALLOWED_IN_CI
    status, output = run_pytest(tmp_path, skips(reason), ci=True)
    assert status == 1
    assert output.count("CI does not allow this skip: test_it.py") == 2


def test_ci_refuses_the_skip_of_a_whole_module(tmp_path: Path) -> None:
    source = f"import pytest\npytest.skip({NO_FUSE!r}, allow_module_level=True)\n"
    status, output = run_pytest(tmp_path, source, ci=True)
    assert status != 0
    assert "CI does not allow this skip: test_it.py" in output


@pytest.mark.parametrize("reason", [NO_DEVICE_MAPPER, NO_FSVERITY])
def test_ci_accepts_what_a_machine_cannot_have(tmp_path: Path, reason: str) -> None:
    status, output = run_pytest(tmp_path, skips(reason), ci=True)
    assert status == 0, output


def test_outside_ci_a_skip_is_a_skip(tmp_path: Path) -> None:
    source = "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('whatever')\n"
    assert run_pytest(tmp_path, source, ci=False)[0] == 0


def test_a_process_that_is_left_behind_fails_the_module(tmp_path: Path) -> None:
    source = (
        "import subprocess, sys, pathlib\n"
        "def test_it():\n"
        "    done = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "    pathlib.Path('pid').write_text(str(done.pid))\n"
    )
    try:
        status, output = run_pytest(tmp_path, source, ci=False)
        assert status == 1
        assert "left behind by the tests of this module" in output
        assert "sleep" in output
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)


@pytest.mark.needs("root")
def test_a_mount_that_is_left_behind_fails_the_module(tmp_path: Path) -> None:
    source = (
        "import subprocess\n"
        "def test_it(tmp_path):\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', tmp_path], check=True)\n"
    )
    try:
        status, output = run_pytest(tmp_path, source, ci=False)
        assert status == 1
        assert "left behind by the tests of this module" in output
    finally:
        subprocess.run(["umount", tmp_path / "base" / "test_it0"], check=True, timeout=30)


def test_a_capability_is_probed_once_and_named(tmp_path: Path) -> None:
    source = (
        "import pytest, tests.capabilities as c\n"
        "c._PROBES['luck'] = (lambda: False, 'no luck on this machine')\n"
        "@pytest.mark.needs('luck')\n"
        "def test_it(): raise AssertionError\n"
        "@pytest.mark.needs('typo')\n"
        "def test_typo(): pass\n"
    )
    status, output = run_pytest(tmp_path, source, ci=False)
    assert status == 1  # a name that nobody probes is an error, not a skip
    assert "1 skipped, 1 error" in output


#: An exception from a lint rule or from the type checker that is followed by nothing.
_WITHOUT_REASON = re.compile(r"#\s*(?:ruff: )?(?:noqa(?::[A-Z0-9, ]*)?|type: ignore(?:\[[a-z, -]*\])?)\s*$")


def test_every_lint_exception_has_its_reason() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for directory in ("ipe_emu", "fs", "tests", "scripts")
        for path in sorted((ROOT / directory).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _WITHOUT_REASON.search(line)
    ]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize("exception", ["noqa", "noqa: S101", "noqa: S101,B023", "type: ignore", "type: ignore[misc]"])
def test_an_exception_without_a_reason_is_seen(exception: str) -> None:
    assert _WITHOUT_REASON.search(f"x = 1  # {exception}")
    assert not _WITHOUT_REASON.search(f"x = 1  # {exception} - because")
