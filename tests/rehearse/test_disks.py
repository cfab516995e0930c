"""Boots with disks: what programs see of them, and device-mapper under its own unmodified tools."""

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from attrs import frozen

from tests.exec_hook.running import Runner
from tests.rehearse.block.images import disk
from tests.rehearse.images import MOUNTS, Booted, add_programs, boot, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

BLOCKS = 64
START = f"{MOUNTS}export PATH=/bin:/usr/sbin\n"
END = "\npoweroff -f\n"


@frozen
class Volume:
    """Data with a hash tree of veritysetup(8)."""

    data: Path
    tree: Path
    root_hash: str

    def disks(self, place: Path) -> tuple[str, ...]:
        """Copy both to where whoever boots can read them, and return the options."""
        return "--disk", f"vda={shutil.copy(self.data, place)}", "--disk", f"vdb={shutil.copy(self.tree, place)}"


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    place = tmp_path_factory.mktemp("volume")
    data, tree = place / "data.img", place / "hash.img"
    data.write_bytes(random.Random(1).randbytes(BLOCKS * 4096))
    done = subprocess.run(
        ["/usr/sbin/veritysetup", "format", data, tree], capture_output=True, text=True, check=True, timeout=30
    )
    tree.chmod(0o644)
    found = re.search(r"Root hash:\s+(\w+)", done.stdout)
    assert found
    return Volume(data, tree, found[1])


def run(emu: Runner, script: str, *options: str, programs: tuple[str, ...] = ()) -> Booted:
    """Boot a tree whose init runs a script, and return what it printed."""
    tree = build_tree(emu.place / "tree", START + script + END)
    add_programs(tree, *programs)
    done = boot(emu, tree, *options)
    assert "powered off" in done.errors, done.errors
    return done


def test_disks_and_partitions_are_there(emu: Runner) -> None:
    image = disk(emu.place / "gpt.img", 'label: gpt\nsize=1MiB, name="boot"\nsize=2MiB, name="root"\n')
    second = emu.place / "second.img"
    second.write_bytes(b"second" + bytes(1 << 20)[6:])
    script = """
cat /proc/partitions
for d in /sys/class/block/*; do echo ${d##*/} $(cat $d/dev $d/size $d/ro); done
cat /sys/block/vda/vda2/uevent /sys/block/vdb/serial; echo
ls -l /dev/vda2 | tr -s ' ' | cut -d' ' -f1-6
/usr/sbin/stat -c '%F %t:%T' - < /dev/vda2
blockdev --getsize64 /dev/vda2; blockdev --getro /dev/vdb; blockdev --getss /dev/vda
head -c 6 /dev/vdb; echo; readlink -f /sys/dev/block/254:16
echo written | dd of=/dev/vda1 2>/dev/null; head -c 7 /dev/vda1; echo
echo x 2>&1 > /dev/vdb || echo cannot write
grep -c device-mapper /proc/devices /proc/misc
"""
    before = image.read_bytes()
    done = run(emu, script, "--disk", f"vdb={second},serial=S2,ro", "--disk", f"vda={image}", programs=("stat",))
    assert done.status == 0, done.errors
    assert done.output == [
        "major minor  #blocks  name",
        "",
        " 254        0       8192 vda",
        " 254        1       1024 vda1",
        " 254        2       2048 vda2",
        " 254       16       1024 vdb",
        "vda 254:0 16384 0",
        "vda1 254:1 2048 0",
        "vda2 254:2 4096 0",
        "vdb 254:16 2048 1",
        *("MAJOR=254", "MINOR=2", "DEVNAME=vda2", "DEVTYPE=partition", "DISKSEQ=1", "PARTN=2", "PARTNAME=root"),
        "S2",
        "brw------- 1 0 0 254, 2",
        "block special file fe:2",
        str(2 << 20),
        "1",
        "512",
        "second",
        "/sys/devices/pci0000:00/0000:00:05.0/virtio1/block/vdb",
        "written",
        "sh: write error: Operation not permitted",
        "cannot write",
        *("/proc/devices:1", "/proc/misc:1"),
    ]
    assert image.read_bytes() == before


def test_what_is_written_can_be_kept(one: Runner) -> None:
    image = one.place / "disk.img"
    image.write_bytes(bytes(1 << 20))
    run(one, "echo kept > /dev/vda", "--disk", f"vda={image},write")
    assert image.read_bytes()[:6] == b"kept\n\0"


def test_nodes_can_be_made_anywhere_and_removed(emu: Runner, volume: Volume) -> None:
    script = """
umask 027
mknod /tmp/disk b 254 0; mknod /tmp/none b 8 0; mknod /tmp/null c 1 3; mknod /tmp/fifo p
stat -c '%n %F %t:%T %a' /tmp/disk /tmp/none; stat -c '%n %F %t:%T' /tmp/null
cmp -n 4096 /tmp/disk /dev/vda && echo same
cat /tmp/none 2>&1
echo gone > /tmp/null && cat /tmp/null
mknod /tmp/disk b 254 0 2>&1
chmod 600 /tmp/disk; stat -c %a /tmp/disk
rm /tmp/disk /tmp/none /tmp/null /tmp/fifo /dev/vdb; ls -1 /tmp /dev/vdb 2>&1
mknod /dev/vdb b 254 16 && head -c 6 /dev/vdb; echo
chown 5:6 /dev/vda && echo given away
"""
    done = run(emu, script, *volume.disks(emu.place))
    assert done.output == [
        *("/tmp/disk block special file fe:0 640", "/tmp/none block special file 8:0 640"),
        "/tmp/null character special file 1:3",
        "same",
        "cat: can't open '/tmp/none': No such device or address",
        "mknod: /tmp/disk: File exists",
        "600",
        *("ls: /dev/vdb: No such file or directory", "/tmp:"),
        "verity",
        "given away",
    ]


def test_veritysetup(emu: Runner, volume: Volume) -> None:
    script = f"""
veritysetup dump /dev/vdb | grep blocks:
veritysetup open /dev/vda root /dev/vdb {volume.root_hash} && echo opened
stat -c '%F %t:%T' /dev/mapper/root
veritysetup status root | sed 's/^ *//'
cmp /dev/mapper/root /dev/vda && echo same
echo x > /dev/mapper/root; echo x > /dev/vda && echo writable || echo in use
veritysetup open /dev/vda root /dev/vdb {volume.root_hash}
cat /sys/block/dm-0/dm/name /sys/block/dm-0/ro; ls -1 /sys/block/dm-0/slaves /sys/block/vda/holders
dmsetup table; dmsetup status; dmsetup deps; dmsetup info -c --noheadings -o name,open,attr
exec 9< /dev/mapper/root; dmsetup remove root 2>&1 | tail -1; exec 9<&-
veritysetup close root && ls -1 /dev/mapper /sys/block
veritysetup status root
"""
    done = run(emu, script, *volume.disks(emu.place), programs=("veritysetup", "dmsetup"))
    table = f"254:0 254:16 4096 4096 {BLOCKS} 1 sha256 {volume.root_hash}"
    # Versions name one unit or another, or none.
    output = [re.sub(r" (sectors|\[.*\])( \(.*\))?$", "", line) for line in done.output]
    assert [line for line in output if not line.startswith("salt:")] == [
        *(f"Data blocks:     \t{BLOCKS}", "Hash blocks:     \t1"),
        "opened",
        "block special file fd:0",
        *("/dev/mapper/root is active.", "type:        VERITY", "status:      verified", "hash type:   1"),
        *("data block:  4096", "hash block:  4096", "hash name:   sha256", "data device: /dev/vda"),
        *(f"size:        {BLOCKS * 8}", "mode:        readonly", "hash device: /dev/vdb"),
        *("hash offset: 8", f"root hash:   {volume.root_hash}"),
        "same",
        "sh: write error: Operation not permitted",
        "writable",
        "Device root already exists.",
        *("root", "1"),
        *("/sys/block/dm-0/slaves:", "vda", "vdb", "", "/sys/block/vda/holders:", "dm-0"),
        next(line for line in done.output if line.startswith(f"root: 0 {BLOCKS * 8} verity 1 {table} ")),
        f"root: 0 {BLOCKS * 8} verity V -",
        "root: 2 dependencies\t: (254, 16) (254, 0)",
        "root:0:L--r",
        "Command failed.",
        *("/dev/mapper:", "control", "", "/sys/block:", "vda", "vdb"),
        "/dev/mapper/root is inactive.",
    ]


def test_a_tampered_block_and_a_wrong_root_hash(one: Runner, volume: Volume) -> None:
    content = bytearray(volume.data.read_bytes())
    content[20 * 4096] ^= 1
    tampered = one.place / "tampered"
    tampered.write_bytes(content)
    script = f"""
veritysetup open /dev/vda root /dev/vdb {volume.root_hash} && echo opened
cat /dev/mapper/root 2>&1 >/dev/null
dd if=/dev/mapper/root bs=4096 count=64 of=/tmp/good 2>&1 | tail -1 | cut -d' ' -f1; stat -c %s /tmp/good
dd if=/dev/mapper/root bs=4096 skip=21 2>/dev/null | wc -c
veritysetup status root | grep status:
veritysetup close root
veritysetup open /dev/vda root /dev/vdb {"0" * 64} 2>&1
dmsetup table 2>&1
"""
    done = run(
        one, script, "--disk", f"vda={tampered}", "--disk", f"vdb={volume.tree}", programs=("veritysetup", "dmsetup")
    )
    assert done.output[:2] == ["opened", "cat: read error: Input/output error"]
    assert str(20 * 4096) in done.output
    assert str((BLOCKS - 21) * 4096) in done.output
    assert "  status:      corrupted" in done.output
    assert "data block 20 (at byte 81920) is corrupted" in done.errors


def test_dmsetup(one: Runner, volume: Volume) -> None:
    script = """
dmsetup version | tail -1; dmsetup targets
dmsetup create a --table '0 8 linear 254:0 16' && dmsetup mknodes && ls -1 /dev/mapper
dmsetup create b --table '0 4 linear /dev/mapper/a 2' && dmsetup ls --tree
dmsetup remove a 2>&1; dmsetup rename b c; dmsetup mknodes; dmsetup ls
dd if=/dev/vda bs=512 skip=18 count=4 of=/tmp/1 2>/dev/null; cmp /tmp/1 /dev/mapper/c && echo same
dmsetup suspend c; dmsetup info -c --noheadings -o name,suspended c; dmsetup resume c
printf '0 4 zero\\n4 4 error\\n' | dmsetup load c && dmsetup resume c && dmsetup table c
dmsetup create d --table '0 4 nonsense' 2>&1 | tail -1
dmsetup create d --table '0 4 linear /dev/vdc 0' 2>&1 | tail -1
dmsetup create d --table '0 4 linear 254:0 100000' 2>&1 | tail -1
dmsetup wipe_table a; dmsetup table a
dmsetup remove_all; dmsetup ls
"""
    done = run(one, script, *volume.disks(one.place), programs=("dmsetup",))
    assert done.status == 0, done.errors
    assert done.output == [
        *("Driver version:    4.50.0", "crypt            v1.29.0", "error            v1.7.0"),
        "linear           v1.5.0",
        *("verity           v1.13.0", "zero             v1.2.0"),
        *("a", "control"),
        *("b (253:1)", " `-a (253:0)", "    `- (254:0)"),
        *("device-mapper: remove ioctl on a  failed: Device or resource busy", "Command failed."),
        *("a\t(253:0)", "c\t(253:1)"),
        "same",
        "c:Suspended",
        *("0 4 zero ", "4 4 error "),
        *["Command failed."] * 3,
        "0 8 error ",
        "No devices found",
    ]
    for said in ("unknown target type 'nonsense' (EINVAL)", "/dev/vdc: No such file", "sectors, and 100004 are mapped"):
        assert said in done.errors


def test_what_is_not_emulated_is_not_passed(one: Runner, volume: Volume) -> None:
    script = "dmsetup create a --table '0 8 striped 1 8 254:0 0' 2>&1 | tail -1"
    done = run(one, script, *volume.disks(one.place), programs=("dmsetup",))
    assert done.status == 4
    assert "a device-mapper target of type striped, which is not emulated" in done.errors


def test_a_scratch_disk_of_cryptsetup(one: Runner) -> None:
    image = one.place / "scratch.img"
    image.write_bytes(bytes(8 << 20))
    script = """
cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file /dev/urandom /dev/vda scratch
cryptsetup status scratch | grep cipher:
mkfs.ext4 -q /dev/mapper/scratch && mount -t ext4 -o ro /dev/mapper/scratch /newroot && ls /newroot
umount /newroot && cryptsetup close scratch && ls -1 /dev/mapper
"""
    done = run(one, script, "--disk", f"vda={image}", programs=("cryptsetup", "mkfs.ext4"))
    assert done.status == 0, done.errors
    assert done.output == ["  cipher:  aes-xts-plain64", "lost+found", "control"]
    assert "not done: ioctl: scratch is not encrypted" in done.errors
    assert not any(image.read_bytes())


def test_links_to_disks_where_the_image_has_udev(emu: Runner) -> None:
    image = disk(
        emu.place / "gpt.img", 'label: gpt\nsize=1MiB, name="boot", uuid=0F5B3A11-2C3D-4E5F-8899-AABBCCDDEEFF\n'
    )
    script = "ls -d /dev/disk/*/*\nhead -c 512 /dev/disk/by-partlabel/boot | wc -c"
    tree = build_tree(emu.place / "tree", f"{START}{script}{END}", {"usr/lib/systemd/systemd-udevd": "#!/bin/false\n"})
    done = boot(emu, tree, "--disk", f"vda={image},serial=S1")
    assert " ".join(done.output).split() == [
        "/dev/disk/by-id/virtio-S1", "/dev/disk/by-id/virtio-S1-part1", "/dev/disk/by-partlabel/boot",
        "/dev/disk/by-partuuid/0f5b3a11-2c3d-4e5f-8899-aabbccddeeff", "/dev/disk/by-path/pci-0000:00:04.0",
        "/dev/disk/by-path/pci-0000:00:04.0-part1", "/dev/disk/by-path/virtio-pci-0000:00:04.0",
        "/dev/disk/by-path/virtio-pci-0000:00:04.0-part1", "512",
    ]  # fmt: skip


def inside_of(place: Path) -> Path:
    """A directory of the host's with something in it, that whoever boots could write to."""
    outside = place / "outside"
    (outside / "dm-0").mkdir(parents=True)
    (outside / "dm-0/kept").write_text("kept")
    (outside / "file").write_text("kept")
    for path in (outside, *outside.rglob("*")):
        os.chown(path, place.stat().st_uid, place.stat().st_gid)
    return outside


def state_of(outside: Path) -> list[tuple[str, int, bytes]]:
    return sorted(
        (str(path), path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (outside, *outside.rglob("*"))
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("mkdir -p /sys/devices/virtual; ln -s {} /sys/devices/virtual/block", "dmsetup remove a", "link 'block'"),
        ("mkdir -p /sys/devices/virtual/block; ln -s {} /sys/devices/virtual/block/dm-0", "", "link 'dm-0'"),
        ("ln -s {}/file /dev/dm-0", "", "something named 'dm-0'"),
        ("ln -s {}/new /dev/dm-0", "", "something named 'dm-0'"),
        ("mkfifo /dev/dm-0", "", "something named 'dm-0'"),
        ("mkdir -p /sys/devices/virtual; echo > /sys/devices/virtual/block", "", "a file 'block'"),
        ("", "B=/sys/devices/virtual/block; mv $B /sys/was; ln -s {} $B; dmsetup remove a", "link 'block'"),
        (
            "",
            "B=/sys/devices/virtual/block; exec 9< /dev/dm-0; dmsetup remove --deferred a\n"
            "mv $B /sys/was; ln -s {} $B; exec 9<&-; dmsetup ls",
            "link 'block'",
        ),
        ("rm /dev/null; ln -s {}/file /dev/null; mknod /tmp/n c 1 3; cat /tmp/n", "", "the place of the device null"),
    ],
)  # fmt: skip
def test_what_the_tree_puts_in_the_way_leads_nowhere(
    emu: Runner, volume: Volume, before: str, after: str, said: str
) -> None:
    outside = inside_of(emu.place)
    as_it_was = state_of(outside)
    script = "\n".join([before, "dmsetup create a --table '0 8 linear 254:0 0'", after]).replace("{}", str(outside))
    done = run(emu, script, *volume.disks(emu.place), programs=("dmsetup",))
    assert state_of(outside) == as_it_was
    assert done.status == 4, done.errors
    assert said in done.errors
    assert "kept" not in "\n".join(done.output)


def test_links_in_what_a_device_has_are_removed_not_followed(emu: Runner, volume: Volume) -> None:
    outside = inside_of(emu.place)
    as_it_was = state_of(outside)
    script = f"""
dmsetup create a --table '0 8 linear 254:0 0'
D=/sys/devices/virtual/block/dm-0
ln -s {outside} $D/link; rm $D/dm/name; ln -s {outside}/file $D/dm/name
dmsetup rename a b; cat /sys/block/dm-0/dm/name
dmsetup remove b && ls -d $D /dev/dm-0 2>&1
"""
    done = run(emu, script, *volume.disks(emu.place), programs=("dmsetup",))
    assert state_of(outside) == as_it_was
    assert done.status == 0, done.errors
    assert done.output == [
        "b",
        "ls: /sys/devices/virtual/block/dm-0: No such file or directory",
        "ls: /dev/dm-0: No such file or directory",
    ]


def test_names_that_are_no_text(one: Runner, volume: Volume) -> None:
    script = r"""
N=$(printf 'a\377'); dmsetup create --manglename none "$N" --table '0 8 linear 254:0 0'
od -An -c /sys/block/dm-0/dm/name; dmsetup remove --manglename none "$N"; ls -1 /sys/block
"""
    done = run(one, script, *volume.disks(one.place), programs=("dmsetup",))
    assert done.status == 0, done.errors
    assert done.output == ["   a 377  \\n", "vda", "vdb"]
