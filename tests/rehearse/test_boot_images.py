"""What `boot` takes as an image: a UKI with its command line, and several files behind each other."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.exec_hook.running import Runner
from tests.rehearse.image.making import TOOLS, compress, member
from tests.rehearse.image.test_uki import uki
from tests.rehearse.images import boot, build_tree
from tests.rootless import ROOT

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

INIT = "mkdir -p /proc; mount -t proc proc /proc; echo $(cat /proc/cmdline); cat /etc/added; /bin/busybox poweroff -f\n"


def packed(place: Path) -> bytes:
    tree = build_tree(place / "tree", INIT)
    names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "--owner", "0:0"],
        cwd=tree, input=names, stdout=subprocess.PIPE, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_a_uki_brings_its_command_line(one: Runner) -> None:
    image = one.place / "linux.efi"
    initrd = compress(TOOLS["zstd"], packed(one.place) + member(b"etc/added", data=b"base\n"))
    image.write_bytes(
        uki(
            [
                (".initrd", initrd), (".cmdline", b"quiet base\0"), (".profile", b"ID=a"),
                (".profile", b"ID=b"), (".cmdline", b"quiet other"),
            ]
        )
    )  # fmt: skip
    assert boot(one, image).output == ["quiet base", "base"]
    assert boot(one, image, "--uki-profile", "1").output == ["quiet other", "base"]
    assert boot(one, image, cmdline="mine").output == ["mine", "base"]


def test_several_images_are_unpacked_one_after_the_other(one: Runner) -> None:
    first, second = one.place / "first", one.place / "second"
    first.write_bytes(compress(TOOLS["gzip"], packed(one.place) + member(b"etc/added", data=b"first\n")))
    second.write_bytes(member(b"etc/added", data=b"second\n"))
    # The runner puts its options, and so the first image, before the image that it is given.
    assert boot(one, second, str(first)).output == ["", "second"]
    assert boot(one, first, str(second)).output == ["", "first"]


ONLY_FOR_ROOT = """set -e
mount -t tmpfs none "$1" && mkdir -m 700 "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$2"
shift 2 && exec "$@"
"""


@pytest.mark.needs("root")
@pytest.mark.parametrize("compressed_by", ["zstd", "lz4"])
def test_a_checkout_that_only_root_can_read(one: Runner, compressed_by: str) -> None:
    """The machine's root has other ids than root: what unpacks must not look for modules of ours any more."""
    image, scratch = one.place / "initrd", one.place / "scratch"
    image.write_bytes(compress(TOOLS[compressed_by], packed(one.place)))
    scratch.mkdir()
    command = one.command_line("boot", str(image))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", ONLY_FOR_ROOT, "sh", scratch, ROOT, *command],
        cwd=one.place, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "result: as expected" in done.stderr) == (0, True), done.stderr
