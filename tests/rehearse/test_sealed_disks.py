"""Boots with a disk whose ext4 has files that fs-verity has sealed, as a kernel sealed them."""

from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests import vectors
from tests.exec_hook.running import Runner
from tests.rehearse.images import MOUNTS, Booted, add_programs, boot, build_tree
from tests.volumes import sealed_images
from tests.volumes.images import protect
from tests.volumes.sealed_images import FILES, regions

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

POLICY = f"""policy_name=Boot policy_version=0.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=EXECUTE fsverity_digest={FILES["hello"].digest()} action=ALLOW
op=EXECUTE fsverity_signature=TRUE action=ALLOW
"""


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def run(emu: Runner, script: str, image: bytes, *options: str, programs: tuple[str, ...] = ("fsverity",)) -> Booted:
    tree = build_tree(emu.place / "tree", f"{MOUNTS}export PATH=/bin:/usr/sbin\n{script}\npoweroff -f\n")
    add_programs(tree, *programs)
    disk = _written(emu.place / "disk.img", image)
    keys = _written(emu.place / "trusted.pem", (vectors.KEYS / "trusted.pem").read_bytes())
    return boot(emu, tree, "--disk", f"vda={disk}", *options, "--fsverity-keys", str(keys), policy=POLICY)


def test_seals_decide_on_a_disk_and_through_an_overlay(emu: Runner) -> None:
    script = """
mkdir /disk /scratch /over; mount -t tmpfs none /scratch; mkdir /scratch/upper /scratch/scratch
mount -t ext4 -o ro /dev/vda /disk
for name in hello plain signed stranger; do /disk/$name 2>/dev/null || echo "$name: $?"; done
mount -t overlay -o lowerdir=/disk,upperdir=/scratch/upper,workdir=/scratch/scratch over /over
/over/hello; /over/plain || echo denied; cat /over/hello >/over/copy; chmod 755 /over/copy; /over/copy || echo denied
fsverity measure /disk/hello | cut -c1-20
fsverity enable /disk/plain 2>&1; cp /disk/plain /scratch; fsverity enable /scratch/plain 2>&1
"""
    done = run(emu, script, sealed_images.image(1024))
    assert [line for line in done.output if "Permission denied" not in line] == [
        "hello", "plain: 126", "signed", "stranger: 126", "hello", "denied", "denied",
        str(FILES["hello"].digest())[:20],
        "ERROR: FS_IOC_ENABLE_VERITY failed on '/disk/plain': Read-only file system",
        "ERROR: FS_IOC_ENABLE_VERITY failed on '/scratch/plain': Inappropriate ioctl for device",
    ]  # fmt: skip
    assert done.status == 1  # something was denied, and everything was judged


def test_what_the_machine_writes_over_a_mounted_disk_is_not_taken_for_sealed(one: Runner) -> None:
    image = sealed_images.image(1024)
    position, _ = regions(image)["data"][0]
    assert image[position:].startswith(FILES["hello"].data)
    script = f"""
mkdir /disk; mount -t ext4 -o ro /dev/vda /disk && /disk/hello
printf '#!/bin/sh\\necho HELLO' | dd of=/dev/vda bs=1 seek={position} conv=notrunc 2>/dev/null
/disk/hello || echo refused
"""
    done = run(one, script, image)
    assert done.output == ["hello", "/init: line 12: /disk/hello: Operation not permitted", "refused"]
    assert done.status == 4
    assert "FILE CORRUPTED" in done.errors


@pytest.mark.parametrize("region", ["data", "tree", "descriptor"])
def test_a_disk_with_a_broken_seal_is_not_judged(one: Runner, region: str) -> None:
    image = bytearray(sealed_images.image(1024))
    image[regions(bytes(image))[region][0][0]] ^= 1
    script = "mkdir /disk; mount -t ext4 -o ro /dev/vda /disk && echo never"
    done = run(one, script, bytes(image))
    assert "never" not in done.output
    assert done.status == 4
    assert "sealed by fs-verity" in done.errors


def test_a_disk_that_is_mounted_for_writing_is_changed_by_it(one: Runner) -> None:
    """Whoever then opens it as a verity device finds it corrupted, and beside it no mount is for reading."""
    volume = protect(Kind.EXT4, _written(one.place / "volume.img", sealed_images.image(4096)))
    script = f"""
mkdir /a /b; mount -t ext4 -o ro /dev/vda /a; mount -t ext4 /dev/vda /b
mount -t ext4 -o ro /dev/vda /b && umount /b; umount /a
mount -t ext4 /dev/vda /a && umount /a && echo mounted for writing
veritysetup open /dev/vda root /dev/vdb {volume.root_hash} && echo open
mount -t ext4 -o ro /dev/mapper/root /a
"""
    done = run(one, script, sealed_images.image(4096), "--disk", f"vdb={volume.hash_image}", programs=("veritysetup",))
    assert done.output == [
        "mount: mounting /dev/vda on /b failed: Device or resource busy",
        "mounted for writing",
        "open",
        "mount: mounting /dev/mapper/root on /a failed: Input/output error",
    ]


def test_sealing_what_is_mounted_for_writing_is_not_judged(one: Runner) -> None:
    image = sealed_images.image(1024)
    position, value = sealed_images.without_feature(image)
    other = _written(one.place / "other.img", image[:position] + bytes.fromhex(value) + image[position + 1 :])
    script = """
mkdir /a /b; mount -t ext4 /dev/vda /a; mount -t ext4 /dev/vdb /b
fsverity enable /b/plain 2>&1; fsverity enable /a/plain 2>&1
"""
    done = run(one, script, image, "--disk", f"vdb={other}")
    assert done.output == [
        "ERROR: FS_IOC_ENABLE_VERITY failed on '/b/plain': Operation not supported",
        "ERROR: FS_IOC_ENABLE_VERITY failed on '/a/plain': Operation not permitted",
    ]
    assert done.status == 4
    assert "sealing /a/plain: what is mounted for writing is read-only here" in done.errors
