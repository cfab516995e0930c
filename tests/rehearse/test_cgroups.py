"""Boots whose init process wants control groups, as systemd does."""

import os
import shutil
from pathlib import Path

import pytest

from ipe_emu.rehearse.cgroups import own_group
from tests.exec_hook.running import Runner, runner, wait_until
from tests.rehearse.images import BOOT_POLICY, MOUNTS, boot, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

#: What makes the image one that may need groups.
SYSTEMD: dict[str, str | bytes] = {"usr/lib/systemd/systemd": ""}
GROUPS = f"{MOUNTS}mount -t cgroup2 cgroup2 /sys/fs/cgroup || echo none\ncd /sys/fs/cgroup\n"


def groups() -> set[Path]:
    return set(own_group().glob("ipe-emu-[0-9]*"))


@pytest.mark.needs("cgroups")
def test_a_machine_has_a_hierarchy_of_its_own(one: Runner) -> None:
    before = groups()
    script = f"""{GROUPS}
grep ^0: /proc/self/cgroup
mkdir -p a/b && echo 0 >a/b/cgroup.procs && grep ^0: /proc/self/cgroup
cat a/b/cgroup.events | head -n 1; cat a/b/cgroup.procs | head -n 1
grep -c -v '0.1.1$' /proc/cgroups
poweroff -f
"""
    done = boot(one, build_tree(one.place / "tree", script, SYSTEMD))
    assert done.output == ["0::/", "0::/a/b", "populated 1", "1", "1"]
    assert done.status == 0, done.errors
    assert groups() <= before


@pytest.mark.needs("cgroups")
def test_nothing_is_left_of_a_killed_one(one: Runner) -> None:
    before = groups()
    tree = build_tree(one.place / "tree", f"{GROUPS}mkdir a; echo 0 >a/cgroup.procs; echo there; read never\n", SYSTEMD)
    (one.place / "boot.pol").write_text(BOOT_POLICY)
    read, write = os.pipe()
    with one.start("boot", "--boot-policy", str(one.place / "boot.pol"), str(tree), stdin=read) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        assert groups() - before
        process.kill()
        os.close(read)
        os.close(write)
    wait_until(lambda: groups() <= before, "the removal of the group")


def test_without_one_systemd_is_told_at_once(tmp_path: Path) -> None:
    nobody = runner(tmp_path, plain_user=os.geteuid() == 0)
    tree = build_tree(
        nobody.place / "tree", f"{GROUPS}ls | wc -l\nexec -a mount /systemd -t cgroup2 none /tmp\n", SYSTEMD
    )
    shutil.copy(tree / "bin/busybox", tree / "systemd")
    done = boot(nobody, tree)
    assert done.output == ["0"]  # a script that mounts it has an empty one
    assert done.status == 4, done.errors
    result = next(line for line in done.errors.splitlines() if "result: " in line)
    assert "systemd as init needs a hierarchy of cgroups of its own" in result
    assert "Delegate=yes" in result
