import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipe_emu.linux import probe
from tests.exec_hook.running import children_of
from tests.rootless import ROOT, as_plain_user

NAMES = {
    "architecture", "/dev/fuse", "fusermount3", "user namespaces", "/proc", "seccomp notification", "mount_setattr",
    "subordinate ids",
}  # fmt: skip
PROGRAM = (
    "import json; from ipe_emu.linux import probe; print(json.dumps({p.name: [p.ok, p.remedy] for p in probe.probe()}))"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def probed(*before: str, user: bool = False, fuse: bool = True, ids: bool = False) -> dict[str, tuple[bool, str]]:
    command = [*before, sys.executable, "-c", PROGRAM]
    if user:
        command = as_plain_user(command, subordinate_ids=ids, fuse=fuse)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=ENVIRONMENT)
    return {name: (ok, remedy) for name, (ok, remedy) in json.loads(done.stdout).items()}


def test_everything_is_probed_and_whatever_lacks_has_a_remedy() -> None:
    found = probe.probe()
    assert {p.name for p in found} == NAMES
    for one in found:
        assert one.detail
        assert one.ok == (not one.remedy), one
    assert "run" in {word for one in found for word in one.needed_for}


@pytest.mark.needs("user-namespaces", "fuse")
def test_nothing_changes_by_probing() -> None:
    links = {kind: Path(f"/proc/self/ns/{kind}").readlink() for kind in ("user", "mnt", "pid")}
    descriptors = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    assert [one.name for one in probe.probe() if not one.ok and one.needed_for] == []
    assert {kind: Path(f"/proc/self/ns/{kind}").readlink() for kind in links} == links
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == descriptors
    assert children_of(os.getpid()) == []


@pytest.mark.needs("root", "user-namespaces")
def test_a_plain_user_is_told_about_a_closed_device_and_missing_ids() -> None:
    assert {name for name, (ok, _) in probed(user=True, fuse=False).items() if not ok} == {
        "/dev/fuse",
        "subordinate ids",
    }
    assert "chmod 666 /dev/fuse" in probed(user=True, fuse=False)["/dev/fuse"][1]
    assert "usermod --add-subuids" in probed(user=True)["subordinate ids"][1]
    assert probed(user=True, ids=True)["subordinate ids"] == (True, "")


@pytest.mark.needs("root", "user-namespaces")
def test_the_limit_that_forbids_namespaces_is_named() -> None:
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    found = probed("unshare", "-Ur", "sh", "-c", limit, "sh")
    assert "user.max_user_namespaces" in found["user namespaces"][1]
    assert not found["/proc"][0]


@pytest.mark.needs("root", "user-namespaces")
def test_a_proc_that_is_partly_covered_is_noticed() -> None:
    found = probed("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc/sys/fs; exec "$@"', "sh")
    assert not found["/proc"][0]
    assert "systempaths=unconfined" in found["/proc"][1]
    assert found["user namespaces"][0]
