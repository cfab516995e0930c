"""Boots of an initramfs as Debian makes it, with systemd's udev in it, to its switch_root and beyond."""

import shutil
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests.capabilities import NO_PACKAGES
from tests.exec_hook.running import Runner
from tests.rehearse import debian
from tests.rehearse.images import Booted, boot
from tests.rehearse.test_verity_root import disks, make_root, policy
from tests.volumes.images import Volume

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def image() -> Path:
    made = debian.initramfs()
    if made is None:
        pytest.skip(NO_PACKAGES)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return make_root(tmp_path_factory.mktemp("root"), Kind.SQUASHFS)


def run(emu: Runner, image: Path, root: Volume, cmdline: str) -> Booted:
    rules = f"dmverity_roothash=sha256:{root.root_hash}"
    own = Path(shutil.copy(image, emu.place / "initrd.img"))
    own.chmod(0o644)
    words = f"{cmdline} rootfstype=squashfs ro ipe.success_audit=1"
    allowed = policy(rules) + "op=KMODULE boot_verified=TRUE action=ALLOW\n"
    return boot(emu, own, *disks(root, emu.place, None), policy=allowed, cmdline=words)


def test_a_verity_root(emu: Runner, image: Path, root: Volume) -> None:
    done = run(emu, image, root, f"root=/dev/mapper/root roothash={root.root_hash}")
    assert done.output[-2:] == ["hello from the verity root", "executed"], done.errors
    assert done.status == 0, done.errors
    rule = f'rule="op=EXECUTE dmverity_roothash="sha256":{root.root_hash.upper()} action=ALLOW"'
    assert any(
        'pid=1 comm="run-init"' in record and 'path="/sbin/init" dev="dm-0"' in record for record in done.records
    )
    assert any('path="/bin/busybox" dev="dm-0"' in record and rule in record for record in done.records)


def test_a_root_that_nobody_vouches_for(one: Runner, image: Path, root: Volume) -> None:
    """It is found by a link that udev makes, and mounted; but none of its programs may run."""
    done = run(one, image, root, "root=/dev/disk/by-id/virtio-ROOT")
    assert done.status == 1, done.errors
    assert any("run-init: can't execute '/sbin/init': Permission denied" in line for line in done.output)
    assert done.record(r'path="/sbin/init" dev="vda".*rule="DEFAULT action=DENY"')
