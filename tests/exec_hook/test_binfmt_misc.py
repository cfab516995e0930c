"""binfmt_misc: no registration is ever in force in a rehearsed tree, whoever makes it, and none can be made in it."""

import os
import subprocess
from pathlib import Path

import pytest

from ipe_emu.exec_hook import binfmt_misc
from tests.exec_hook.running import LIMIT, Runner, runner
from tests.rootless import ROOT

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

WHO = ("caller", "plain-user") if os.geteuid() == 0 else ("caller",)
EVERY_NAMESPACE_HAS_ONE = pytest.mark.skipif(
    not binfmt_misc.has_registries(os.uname().release), reason="this kernel has one registry for all, this machine's"
)

# A script, and a program that is to be its interpreter instead of the shell: it says the script's name.
PREPARE = r"""
mkdir mounted formats; mount -t tmpfs none mounted
cp /bin/busybox mounted/echo; printf '#!/bin/sh\necho run by a shell\n' >mounted/x.foo; chmod +x mounted/*
"""
MOUNT = {
    "mount": "mount -t binfmt_misc none formats",
    "fsopen": """python3 -c '
import ctypes
libc = ctypes.CDLL(None)
context = libc.syscall(430, b"binfmt_misc", 0)
libc.syscall(431, context, 6, None, None, 0)
mount = libc.syscall(432, context, 0, 0)
libc.syscall(429, mount, b"", -100, b"formats", 4)
'""",
}
USE = """
echo ":foo:E::foo::$PWD/mounted/echo:F" >formats/register; ./mounted/x.foo
"""


@pytest.fixture(params=WHO)
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain-user")


@pytest.mark.parametrize("how", MOUNT)
@pytest.mark.parametrize("nested", [False, True])
def test_a_tree_cannot_register_an_interpreter(emu: Runner, how: str, nested: bool) -> None:
    script = emu.place / "script"
    script.write_text(PREPARE + MOUNT[how] + USE)
    done = emu.shell(f"{'unshare -Urm ' * nested}sh ./script; exit 0")
    assert done.stdout == "run by a shell\n"
    assert done.returncode == 125
    assert "binfmt_misc" in done.stderr


def test_other_mounts_are_left_to_the_kernel(emu: Runner) -> None:
    done = emu.shell(
        "mkdir a b; mount -t tmpfs none a && mount --bind a b && mount -o remount,bind,ro a && mount -t nothing none a;"
        "setpriv --bounding-set -all --inh-caps -all mount -t binfmt_misc none b; true 2>/dev/null >a/file || exit 6"
    )
    assert done.returncode == 6, done.stderr


@EVERY_NAMESPACE_HAS_ONE
def test_what_is_registered_around_it_is_not_in_force(tmp_path: Path) -> None:
    emu = " ".join(Runner(tmp_path, plain_user=False).command_line("run"))
    script = PREPARE + MOUNT["mount"] + USE + f"{emu} -- ./mounted/x.foo; echo $?"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout.splitlines() == ["./mounted/x.foo", "run by a shell", "0"]


@pytest.mark.parametrize(
    ("release", "many"),
    [("6.6.99", False), ("6.7.0-rc1", True), ("6.18.44-x", True), ("5.19", False), ("7.3", True), ("odd", False)],
)
def test_which_kernels_have_many(release: str, many: bool) -> None:
    assert binfmt_misc.has_registries(release) is many
