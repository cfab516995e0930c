"""Boots from a verity device: opened by veritysetup in the initramfs, mounted, and switched into."""

import re
import shutil
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests.exec_hook.running import Runner
from tests.integrity.test_dm_verity_signature import sign
from tests.rehearse.images import MOUNTS, Booted, add_programs, boot, build_tree
from tests.vectors import KEYS
from tests.volumes.images import Volume, make_volume

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

START = f"{MOUNTS}export PATH=/bin:/usr/sbin\n"
NEW_INIT = """#!/bin/sh
read text < /etc/hello
echo $text
/bin/busybox true && echo executed
/bin/busybox poweroff -f
"""
SWITCH = """
mount -t $TYPE -o ro /dev/mapper/root /newroot || echo cannot mount
umount /sys/kernel/security /sys /proc /dev
exec switch_root /newroot /sbin/init
"""


def make_root(place: Path, kind: Kind) -> Volume:
    """Make a root file system with busybox and an init script."""
    tree = place / "tree"
    for name in ("bin", "sbin", "etc", "proc", "sys", "dev", "run"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "etc/hello").write_text("hello from the verity root\n")
    (tree / "sbin/init").write_text(NEW_INIT)
    (tree / "sbin/init").chmod(0o755)
    return make_volume(kind, tree, place)


def disks(root: Volume, place: Path, content: bytes | None) -> tuple[str, ...]:
    """Copy both images to where whoever boots can read them, or other content, and return the options."""
    data, hashes = place / "root.img", place / "root.verity"
    data.write_bytes(root.image.read_bytes() if content is None else content)
    hashes.write_bytes(root.hash_image.read_bytes())
    return "--disk", f"vda={data},serial=ROOT", "--disk", f"vdb={hashes}"


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return make_root(tmp_path_factory.mktemp("squashfs"), Kind.SQUASHFS)


def policy(rule: str) -> str:
    return f"""policy_name=Boot policy_version=0.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=EXECUTE {rule} action=ALLOW
"""


def run(
    emu: Runner, root: Volume, script: str, *options: str, rule: str = "", content: bytes | None = None,
    files: dict[str, str | bytes] | None = None, kernel: str = "linux-7.3", cmdline: str = "ipe.success_audit=1",
) -> Booted:  # fmt: skip
    tree = build_tree(emu.place / "tree", f"{START}TYPE={root.kind.value}\n{script}", files)
    add_programs(tree, "veritysetup", "dmsetup")
    rule = rule or f"dmverity_roothash=sha256:{root.root_hash}"
    arguments = [*disks(root, emu.place, content), "--kernel", kernel, *options]
    return boot(emu, tree, *arguments, policy=policy(rule), cmdline=cmdline)


def opening(root: Volume, *options: str) -> str:
    return f"veritysetup open {' '.join(options)} /dev/vda root /dev/vdb {root.root_hash} || echo cannot open\n"


def test_programs_of_the_root_run_by_its_root_hash(emu: Runner, squashfs: Volume) -> None:
    script = f"""
mount -t squashfs /dev/mapper/root /newroot 2>&1
{opening(squashfs)}
mount -t ext4 -o ro /dev/mapper/root /newroot
mount -o ro /dev/vda /newroot
busybox mount -t squashfs /dev/mapper/root /newroot && cat /newroot/etc/hello
dmsetup info -c --noheadings -o open root
mount -t squashfs -o ro /dev/mapper/root /tmp && ls -1 /tmp/etc
umount /tmp /newroot && veritysetup close root && ls -1 /dev/mapper
{opening(squashfs)}
mount -t tmpfs none /tmp; cp /bin/busybox /tmp/cat; /tmp/cat /etc/hello || echo denied
{SWITCH}
"""
    done = run(emu, squashfs, script)
    said = [line for line in done.output if "/tmp/cat: Permission denied" not in line]
    assert said == [
        "mount: mounting /dev/mapper/root on /newroot failed: No such file or directory",
        "mount: mounting /dev/mapper/root on /newroot failed: Invalid argument",
        "mount: mounting /dev/vda on /newroot failed: Device or resource busy",
        "hello from the verity root",
        "1",
        "hello",
        "control",
        "denied",
        "hello from the verity root",
        "executed",
    ]
    assert done.status == 1  # for the denial on the tmpfs
    last = [record for record in done.records if 'pid=1 comm="init"' in record or 'comm="switch_root"' in record]
    hashed = squashfs.root_hash.upper()
    rule = f'rule="op=EXECUTE dmverity_roothash="sha256":{hashed} action=ALLOW"'
    assert any('path="/sbin/init" dev="dm-0" ino=' in record and rule in record for record in last)
    assert all("boot_verified=TRUE" not in record for record in done.records[done.records.index(last[-1]) :])


@pytest.mark.parametrize("kind", [Kind.EXT4, Kind.EROFS])
def test_other_file_systems(one: Runner, tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> None:
    root = make_root(tmp_path_factory.mktemp(kind.value), kind)
    done = run(one, root, opening(root) + SWITCH)
    assert done.output == ["hello from the verity root", "executed"]
    assert done.status == 0, done.errors


def test_another_table_under_a_mounted_file_system_is_not_judged(one: Runner, squashfs: Volume) -> None:
    """What was read by the one table must not be judged by the root hash of the other."""
    script = """
mount -t tmpfs none /tmp
echo "0 $(cat /sys/block/vda/size) linear /dev/vda 0" >/tmp/plain
dmsetup create --readonly root /tmp/plain && dmsetup mknodes root
mount -t squashfs -o ro /dev/mapper/root /newroot && cat /newroot/etc/hello
echo "0 $(cat /sys/block/vda/size) error" >/tmp/other
dmsetup load --readonly root /tmp/other && dmsetup suspend root && dmsetup resume root
echo resumed $?
poweroff -f
"""
    done = run(one, squashfs, script)
    assert "hello from the verity root" in done.output
    assert done.status == 4, done.errors
    assert "dm-0 got another table while its squashfs was mounted" in done.errors


def test_a_read_error_that_its_program_hides_is_not_judged(
    one: Runner, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A device below dm-verity fails after the mount: a kernel's reader gets EIO, and here he gets something else."""
    root = make_root(tmp_path_factory.mktemp("ext4"), Kind.EXT4)
    script = f"""
mount -t tmpfs none /tmp
echo "0 $(cat /sys/block/vda/size) linear /dev/vda 0" >/tmp/plain
dmsetup create low /tmp/plain && dmsetup mknodes low
veritysetup open /dev/mapper/low root /dev/vdb {root.root_hash} || echo cannot open
mount -t ext4 -o ro /dev/mapper/root /newroot && echo mounted
echo "0 $(cat /sys/block/vda/size) error" >/tmp/other
dmsetup load low /tmp/other && dmsetup suspend low && dmsetup resume low
cat /newroot/etc/hello
poweroff -f
"""
    done = run(one, root, script)
    assert "mounted" in done.output
    assert "hello from the verity root" not in done.output
    assert done.status == 4, done.errors
    assert "does not pass on that dm-1 cannot be read" in done.errors


def test_another_images_root_hash(one: Runner, squashfs: Volume) -> None:
    other = "ab" * 32
    done = run(one, squashfs, opening(squashfs) + SWITCH, rule=f"dmverity_roothash=sha256:{other}")
    assert done.status == 1
    assert "switch_root: can't execute '/sbin/init': Permission denied" in done.output


def test_a_tampered_root(one: Runner, squashfs: Volume) -> None:
    content = bytearray(squashfs.image.read_bytes())
    content[len(content) // 2] ^= 1
    done = run(one, squashfs, opening(squashfs) + SWITCH, content=bytes(content))
    assert done.status != 0
    assert "executed" not in done.output
    assert ": tampered volume: " in done.errors
    assert re.search(r"device-mapper: verity: 254:0: data block \d+ .* is corrupted", done.errors)


@pytest.mark.parametrize(
    ("option", "end"),
    [
        ("--restart-on-corruption", "restarted by itself, by restart_on_corruption of the verity device root"),
        ("--panic-on-corruption", "Kernel panic - not syncing: dm-verity device corrupted"),
    ],
)
def test_corruption_that_ends_the_machine(one: Runner, squashfs: Volume, option: str, end: str) -> None:
    content = bytearray(squashfs.image.read_bytes())
    content[len(content) // 2] ^= 1
    script = f"{opening(squashfs, option)}echo opened; cat /dev/mapper/root >/dev/null; echo went on"
    done = run(one, squashfs, script, content=bytes(content))
    assert done.output == ["opened"]
    assert done.status == 3, done.errors
    assert end in done.errors
    assert "dm-verity device corrupted" in done.errors


def test_corruption_that_a_kernel_might_read_ahead(one: Runner, squashfs: Volume) -> None:
    content = bytearray(squashfs.image.read_bytes())
    content[len(content) // 2] ^= 1
    script = f"{opening(squashfs, '--restart-on-corruption')}head -c 512 /dev/mapper/root >/dev/null; poweroff -f"
    done = run(one, squashfs, script, content=bytes(content))
    assert done.status == 4, done.errors
    assert "the verity device root is corrupted where it was not read: data block" in done.errors


@pytest.mark.parametrize(
    ("option", "end"),
    [
        ("restart_on_error", "restarted by itself, by restart_on_error of the verity device root"),
        ("panic_on_error", "Kernel panic - not syncing: dm-verity device has I/O error"),
    ],
)
def test_a_read_error_that_ends_the_machine(one: Runner, squashfs: Volume, option: str, end: str) -> None:
    script = f"""
mount -t tmpfs none /tmp
echo "0 $(cat /sys/block/vda/size) error" >/tmp/low
dmsetup create low /tmp/low && dmsetup mknodes low
{opening(squashfs)}
dmsetup table root | sed 's/ 254:0 / 253:0 /; s/$/ 1 {option}/' >/tmp/table
cat /tmp/table
dmsetup create --readonly bad /tmp/table && dmsetup mknodes bad && echo made
cat /dev/mapper/bad >/dev/null; echo went on
"""
    done = run(one, squashfs, script)
    assert done.output[-1] == "made", done.errors
    assert done.status == 3, done.errors
    assert end.replace("device root", "device bad") in done.errors


def test_mounting_again_what_was_changed_where_corruption_is_ignored(one: Runner, tmp_path: Path) -> None:
    """The change is seen, with the root hash of what was there before (as on a kernel)."""
    root = make_root(tmp_path / "made", Kind.EXT4)
    text = b"hello from the verity root"
    place = root.image.read_bytes().index(text)
    script = f"""
{opening(root, "--ignore-corruption")}
mount -t ext4 -o ro /dev/mapper/root /newroot && cat /newroot/etc/hello; umount /newroot
printf J | dd of=/dev/vda bs=1 seek={place} conv=notrunc 2>/dev/null
mount -t ext4 -o ro /dev/mapper/root /newroot && cat /newroot/etc/hello
/newroot/bin/busybox true && echo executed
poweroff -f
"""
    done = run(one, root, script)
    assert done.output == ["hello from the verity root", "Jello from the verity root", "executed"], done.errors
    assert f'dmverity_roothash="sha256":{root.root_hash.upper()}' in done.record(
        'path="/newroot/bin/busybox".*MMAP|MMAP.*path="/newroot/bin/busybox"'
    )


@pytest.mark.parametrize("kind", [Kind.EXT4, Kind.EROFS])
def test_corruption_that_comes_under_a_mounted_file_system(one: Runner, tmp_path: Path, kind: Kind) -> None:
    """What mounts these here would not pass on a kernel's EIO, or has read it before."""
    root = make_root(tmp_path / "made", kind)
    place = root.image.read_bytes().index(b"hello from the verity root")
    script = f"""
{opening(root)}
mount -t {kind.value} -o ro /dev/mapper/root /newroot && echo mounted
printf J | dd of=/dev/vda bs=1 seek={place} conv=notrunc 2>/dev/null
grep -q Jello /newroot/etc/hello && echo changed
poweroff -f
"""
    done = run(one, root, script)
    assert done.output == ["mounted"]
    assert done.status == 4, done.errors


def test_a_signed_root_hash(emu: Runner, squashfs: Volume, tmp_path: Path) -> None:
    signature = sign(tmp_path, squashfs.root_hash.encode())
    shutil.copy(KEYS / "trusted.pem", emu.place / "key.pem")
    shutil.copy(KEYS / "ec.pem", emu.place / "other.pem")
    script = opening(squashfs, "--root-hash-signature=/etc/root.p7s")
    files: dict[str, str | bytes] = {"etc/root.p7s": signature}
    rule = "dmverity_signature=TRUE"
    trusted = run(
        emu, squashfs, script + SWITCH, "--secondary-keys", str(emu.place / "key.pem"), rule=rule, files=files
    )
    assert trusted.output == ["hello from the verity root", "executed"]
    assert trusted.status == 0, trusted.errors
    shutil.rmtree(emu.place / "tree")
    unsigned = run(emu, squashfs, opening(squashfs) + SWITCH, rule=rule)
    assert unsigned.status == 1
    assert "executed" not in unsigned.output
    shutil.rmtree(emu.place / "tree")
    stranger = run(
        emu, squashfs, f"{script}poweroff -f", "--secondary-keys", str(emu.place / "other.pem"), rule=rule, files=files
    )
    assert "cannot open" in stranger.output
    assert "(ENOKEY)" in stranger.errors


def test_a_machine_that_requires_signatures(one: Runner, squashfs: Volume) -> None:
    script = f"{opening(squashfs)}poweroff -f"
    done = run(one, squashfs, script, cmdline="dm_verity.require_signatures=1")
    assert "cannot open" in done.output
    assert "(ENOKEY)" in done.errors
