"""Boots in which something listens to the kernel's events of devices, as udev does."""

import pytest

from tests.exec_hook.running import Runner
from tests.rehearse.test_disks import Volume, run, volume

__all__ = ["volume"]

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

UUID = "01234567-89ab-cdef-0123-456789abcdef"
LISTEN = """
mount -t tmpfs none /tmp && : >/tmp/seen
uevent sh -c 'echo $ACTION $DEVNAME $DEVTYPE $SYNTH_UUID $SYNTH_ARG_A$DM_COOKIE' >/tmp/seen &
until grep -q add /tmp/seen; do echo add >/sys/block/vda/uevent; done
"""


def test_events_of_disks_and_mapped_devices(emu: Runner, volume: Volume) -> None:
    script = f"""{LISTEN}
echo 'change {UUID} A=1' >/sys/class/block/vda/uevent
echo adding >/sys/block/vda/uevent; cat /sys/block/vda/uevent
echo 0 128 linear /dev/vda 0 | dmsetup --noudevsync create low
dmsetup --noudevsync suspend low && dmsetup --noudevsync resume low
dmsetup --noudevsync remove low
until grep -q 'remove dm-0' /tmp/seen && grep -c remove /tmp/seen | grep -q 2; do :; done
sed 's/disk [0-9]*$/disk with a cookie/' /tmp/seen | uniq
"""
    done = run(emu, script, *volume.disks(emu.place), programs=("dmsetup",))
    said = [line for line in done.output if not line.startswith("low")]
    assert said == [
        "sh: write error: Invalid argument",
        "MAJOR=254", "MINOR=0", "DEVNAME=vda", "DEVTYPE=disk", "DISKSEQ=1",
        "add vda disk with a cookie",  # the 0 of SYNTH_UUID
        f"change vda disk {UUID} 1",
        "add dm-0 disk",
        "change dm-0 disk with a cookie",
        "remove dm-0 disk with a cookie",
        "remove dm-0 disk",
    ]  # fmt: skip


def test_what_sysfs_says_that_it_is(one: Runner, volume: Volume) -> None:
    script = """
stat -f -c %t /sys /sys/block /sys/kernel/security /dev /proc
stat -c %i -L /proc/self/ns/pid /proc/self/ns/cgroup
"""
    done = run(one, script, *volume.disks(one.place))
    assert done.output == ["62656572", "62656572", "73636673", "1021994", "9fa0", str(0xEFFFFFFC), str(0xEFFFFFFB)]
