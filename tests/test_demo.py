"""The demo: as root and as a user without privileges it runs as expected, and a step that does not is noticed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rootless import as_plain_user

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "scripts" / "demo"

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(120)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that everybody may write to, with the program in it."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)
    program = place / "ipe-emu"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}:{ROOT}/fs exec {sys.executable} -m ipe_emu "$@"\n')
    program.chmod(0o755)
    return place


def demo(place: Path, *options: str | Path, plain_user: bool = False) -> tuple[int, str]:
    command = [str(DEMO), *map(str, options)]
    environment = dict(os.environ) | {"IPE_EMU": str(place / "ipe-emu"), "TMPDIR": str(place)}
    done = subprocess.run(
        as_plain_user(command, place) if plain_user else command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert list(place.glob("ipe-demo.*")) == []  # it cleans up, however it ends
    return done.returncode, done.stdout


def attempts(output: str) -> dict[str, list[str]]:
    """What each attempt gave: its lines up to and with the outcome, by the command."""
    found: dict[str, list[str]] = {}
    lines = iter(output.splitlines())
    for line in lines:
        if line.startswith("   $ "):
            shown = found.setdefault(line[5:], [])
            for inner in lines:
                shown.append(inner.strip())
                if inner.startswith("     => "):
                    break
    return found


@pytest.mark.parametrize(
    "plain_user", [False, pytest.param(True, marks=pytest.mark.needs("root"))], ids=["self", "user"]
)
def test_every_step_is_as_expected(place: Path, plain_user: bool) -> None:
    status, output = demo(place, plain_user=plain_user)
    assert status == 0, output
    assert re.search(r"All \d+ attempts as expected", output)
    steps = attempts(output)
    assert steps["/volume/bin/app"][-2:] == ["the application of the volume runs", "=> done"]
    copied = steps["/tmp/app"]
    assert 'path="/tmp/app"' in copied[0]
    assert copied[-1] == "=> Permission denied"
    assert steps["/bin/ls"][-1] == "=> Permission denied"
    assert 'policy_name="Vendor" policy_version=1.1.0' in steps["/volume/bin/cat /volume/vendor.p7b >new_policy"][-2]


def test_a_released_kernel_stops_it_at_the_first_unsigned_policy(place: Path) -> None:
    status, output = demo(place, "--kernel", "linux-7.3")
    assert status == 1
    assert attempts(output)["/bin/cat /tmp/lockdown.pol >new_policy"][-1] == "=> Bad message (wanted: done)"
    assert re.search(r"\d+ of \d+ attempts NOT as expected\.", output)


def test_a_policy_that_allows_too_much_is_noticed(place: Path, tmp_path: Path) -> None:
    policy = tmp_path / "boot.pol"
    policy.write_text("policy_name=AllowInitramfs policy_version=0.0.0\nDEFAULT action=ALLOW\n")
    status, output = demo(place, "--boot-policy", policy)
    assert status == 1
    first = attempts(output)["/tmp/busybox cat /tmp/anybodys.pol >new_policy"]
    assert "=> Permission denied" not in first[-1]


def test_an_audit_record_that_is_missing_is_noticed(place: Path) -> None:
    status, output = demo(place, "--cmdline", "ipe.success_audit=0")
    assert status == 1
    assert 'NO AUDIT RECORD AS EXPECTED: EXECUTE ipe_hook=BPRM_CHECK .*path="/volume/bin/app"' in output


def test_a_boot_that_dies_is_noticed(place: Path) -> None:
    status, output = demo(place, "--boot-policy", "/nonexistent")
    assert status != 0
    assert "The boot did not come to its end." in output
