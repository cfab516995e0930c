"""Files on overlays: the facts are those of the layer they come from."""

import os
import re
import shutil
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests.exec_hook.running import Runner, runner
from tests.volumes.images import Volume, make_volume

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    directory, place = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("volume")
    busybox = shutil.which("busybox")
    assert busybox
    for name in ("ash", "lower/ash", "gone/ash"):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy(busybox, directory / name)
    volume = make_volume(Kind.SQUASHFS, directory, place)
    volume.hash_image.chmod(0o644)
    return volume


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    (tmp_path / "mnt").mkdir()
    return runner(tmp_path, plain_user=request.param == "plain-user")


#: A tmpfs with directories for layers, and a function that mounts an overlay of them.
BEGINNING = """
    mkdir -p /tmp/ovl-test; mount -t tmpfs none /tmp/ovl-test; volume=$PWD/mnt; cd /tmp/ovl-test
    mkdir o p plain up work up2 work2
    overlay() { mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3,userxattr" "$4"; }
    run() { "$@" -c 'echo runs' 2>/dev/null || echo "$? $1"; }
"""


def rehearse(emu: Runner, volume: Volume, script: str) -> "tuple[int, list[str], str]":
    images = [Path(shutil.copy(path, emu.place)) for path in (volume.image, volume.hash_image)]
    policy = emu.place / "volume.pol"
    policy.write_text(
        "policy_name=Volume policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
        f"op=EXECUTE dmverity_roothash=sha256:{volume.root_hash} action=ALLOW\n"
    )
    here = Volume(volume.kind, images[0], images[1], volume.root_hash)
    done = emu.shell(
        BEGINNING + script, "--boot-policy", str(policy), "--boot-verified", "/usr", "--volume", here.option("mnt")
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_the_topmost_layer_that_has_the_file_decides(emu: Runner, volume: Volume) -> None:
    script = """
        mkdir plain/lower; cp $volume/ash plain/ash; cp -p $volume/lower/ash plain/lower/new
        overlay plain:$volume up work o
        run o/ash; run o/lower/ash; run o/lower/new; run o/gone/ash
        rm -r o/gone; mkdir o/gone; cp -p $volume/gone/ash o/gone/ash; run o/gone/ash
        chmod 700 o/lower/ash; run o/lower/ash
    """
    status, said, errors = rehearse(emu, volume, script)
    assert said == ["126 o/ash", "runs", "126 o/lower/new", "runs", "126 o/gone/ash", "126 o/lower/ash"], errors
    assert status == 0, errors


def test_layers_are_known_when_their_paths_lead_nowhere_any_more(emu: Runner, volume: Volume) -> None:
    """As after switch_root; through a bind mount of a part of an overlay, and on an overlay over an overlay."""
    script = """
        mkdir lower; mount --bind $volume lower
        overlay lower up work o; overlay o up2 work2 p
        umount lower; rmdir lower
        run o/ash; run p/lower/ash; cp -p $volume/ash p/new; run p/new; cp -p $volume/ash o/other; run p/other
        mkdir b; mount --bind p/lower b; run b/ash
        mount -t tmpfs none up 2>/dev/null; run o/ash
        cp --reflink=never $volume/ash up/ash; run up/ash
    """
    status, said, errors = rehearse(emu, volume, script)
    assert said == ["runs", "runs", "126 p/new", "126 p/other", "runs", "runs", "126 up/ash"], errors
    assert status == 0, errors


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "mkdir lower; mount --bind $volume lower; overlay lower up work o; run o/ash; umount o; umount lower;"
            " cp $volume/ash lower; overlay lower up work o; run o/ash",
            "its directories were others before, under the same names",
        ),
        (
            "overlay $volume up work o; cp -p $volume/ash o/new; exec 3<o/new; rm o/new; run /proc/self/fd/3",
            "none of its layers has it, or it was deleted",
        ),
    ],
    ids=["other-directories", "deleted"],
)
def test_what_cannot_be_told_is_not_judged(emu: Runner, volume: Volume, script: str, why: str) -> None:
    status, said, errors = rehearse(emu, volume, script)
    assert status == 125
    assert re.search(r"could not be judged: \d", errors), errors
    assert why in errors
    assert said[-1].startswith("126 "), said


def test_overlays_are_not_made_by_fsopen(emu: Runner, volume: Volume) -> None:
    """Programs then use mount(2), where their layers can be seen."""
    program = emu.place / "fsopen.py"
    program.write_text(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for kind in (b'overlay', b'tmpfs'):\n"
        "    found = libc.syscall(430, kind, 0)\n"
        "    print(os.strerror(ctypes.get_errno()) if found < 0 else 'opened')\n"
    )
    done = emu.run("run", "--", "/usr/bin/python3", str(program))
    assert done.stdout.splitlines() == ["Function not implemented", "opened"], done.stderr
