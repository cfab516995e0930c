"""mount(2) in a rehearsed tree: a mount is made noexec, or the run says that it could not be."""

import os
from pathlib import Path

import pytest

from tests.exec_hook.running import Runner, runner

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

WHO = ("caller", "plain-user") if os.geteuid() == 0 else ("caller",)

REMOUNT = """python3 -c '
import ctypes
print(ctypes.CDLL(None).mount(None, b"here", None, 0x1028 | %d, None))
'"""


@pytest.fixture(params=WHO)
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain-user")


def test_a_mount_is_noexec_or_the_run_is_not_judged(emu: Runner) -> None:
    """The mount's own flags are not named: where they are locked, the kernel refuses."""
    done = emu.shell(f"mkdir here; mount --bind /usr/bin here; {REMOUNT % 0}; here/true && echo executed; exit 0")
    if done.stdout.splitlines()[0] == "0":
        assert done.returncode == 0
        assert "executed" not in done.stdout
    else:
        assert done.returncode == 125
        assert "noexec" in done.stderr


@pytest.mark.needs("root")
def test_whoever_names_the_other_flags_is_served(tmp_path: Path) -> None:
    emu = runner(tmp_path, plain_user=False)
    done = emu.shell(f"mkdir here; mount --bind /usr/bin here; {REMOUNT % 4}; here/true && echo executed; exit 0")
    assert (done.returncode, done.stdout) == (0, "0\n")
