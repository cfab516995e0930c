"""mount(2), umount2(2) and pivot_root(2) in a rehearsed machine, as scripts use them."""

import pytest

from tests.exec_hook.running import Runner
from tests.rehearse.images import MOUNTS, boot, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]


def run_script(emu: Runner, script: str, *, status: int = 0, cmdline: str = "") -> list[str]:
    """Boot an image whose init runs ``script`` and powers off; return what it printed."""
    done = boot(emu, build_tree(emu.place / "tree", f"exec 2>&1\n{script}\npoweroff -f\n"), cmdline=cmdline)
    assert done.status == status, done.errors
    return done.output


def test_the_texts_of_proc(one: Runner) -> None:
    output = run_script(
        one, "mount -t proc p /proc; cat /proc/cmdline; grep -c . /proc/filesystems; ls -d /proc/1", cmdline="a  b=c"
    )
    assert output[0] == "a  b=c"
    assert int(output[1]) > 8
    assert output[2] == "/proc/1"


def test_devices(emu: Runner) -> None:
    output = run_script(
        emu,
        """
        mount -t devtmpfs none /dev
        for name in null zero full random urandom tty console kmsg; do [ -c /dev/$name ] || echo no $name; done
        echo lost > /dev/null; head -c 3 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c
        echo "<4>said to the log" > /dev/kmsg
        echo straight > /dev/console
        mkdir -p /dev/pts; mount -t devpts devpts /dev/pts && ls /dev/pts
        [ -w /dev/ptmx ] || echo no ptmx
        """,
    )
    assert output == ["3", "4", "straight", "ptmx"]


def test_the_securityfs_can_be_mounted_anywhere_and_often(emu: Runner) -> None:
    output = run_script(
        emu,
        f"""{MOUNTS}
        mkdir /tmp/a; mount -t securityfs none /tmp/a
        cat /tmp/a/ipe/policies/Boot/name; echo
        echo 0 > /tmp/a/ipe/enforce; cat $IPE/enforce; echo
        umount /tmp/a; ls /tmp/a
        umount /sys/kernel/security; ls /sys/kernel/security
        mount -t securityfs none /sys/kernel/security; cat $IPE/enforce; echo
        """,
    )
    assert output == ["Boot", "0", "0"]


def test_the_same_file_system_twice_on_one_directory(one: Runner) -> None:
    output = run_script(
        one,
        f"""{MOUNTS}
        for kind in proc sysfs devtmpfs securityfs; do
            case $kind in
            proc) at=/proc;; sysfs) at=/sys;; devtmpfs) at=/dev;; *) at=/sys/kernel/security;;
            esac
            mount -t $kind none $at && echo $kind mounted twice
        done
        """,
    )
    assert len(output) == 4
    assert all(line.endswith("Device or resource busy") for line in output), output


def test_unmounting_what_is_in_use(emu: Runner) -> None:
    output = run_script(
        emu,
        """
        mount -t proc proc /proc; mount -t devtmpfs none /dev; mount -t sysfs none /sys
        (cd /proc && umount /proc && echo busy proc unmounted)
        exec 3< /dev/null; umount /dev && echo busy dev unmounted; exec 3<&-
        mkdir /dev/shm; mount -t tmpfs none /dev/shm; umount /dev && echo dev with mounts unmounted; umount /dev/shm
        umount /dev && umount /proc && umount /sys && echo unmounted
        ls /dev /proc /sys
        mount -t proc proc /proc; (cd /proc; umount -l /proc && ls /proc)
        mount -t proc proc /proc && cat /proc/cmdline
        """,
        cmdline="again",
    )
    # /dev/console of the initramfs lies below the devtmpfs.
    assert output[:3] == [
        "umount: can't unmount /proc: Device or resource busy",
        "umount: can't unmount /dev: Device or resource busy",
        "umount: can't unmount /dev: Device or resource busy",
    ]
    assert output[3] == "unmounted"
    assert output[-1] == "again"


def test_mounts_are_moved_into_the_new_root(emu: Runner) -> None:
    output = run_script(
        emu,
        f"""{MOUNTS}
        mount -t tmpfs none /newroot; mkdir /newroot/dev /newroot/sys /newroot/proc
        for at in dev sys proc; do mount --move /$at /newroot/$at || echo $at does not move; done
        ls /dev /proc; cat /newroot/proc/cmdline; ls /newroot/sys/kernel/security/ipe/policies; [ -c /newroot/dev/null ]
        """,
        cmdline="moved",
    )
    assert output == ["/dev:", "console", "", "/proc:", "moved", "Boot"]


def test_binding_takes_along_what_a_kernel_has_in_one_file_system(emu: Runner) -> None:
    output = run_script(
        emu,
        f"""{MOUNTS}
        mkdir /tmp/dev /tmp/proc /tmp/sys /tmp/mapper; touch /tmp/null
        mount --bind /dev /tmp/dev && [ -c /tmp/dev/null ] && echo device
        mount --bind /proc /tmp/proc && cat /tmp/proc/cmdline
        mount --bind /dev/mapper /tmp/mapper && echo mapper
        mount --bind /dev/null /tmp/null && [ -c /tmp/null ] && echo null
        mount --rbind /sys /tmp/sys && ls /tmp/sys/kernel/security/ipe/policies
        umount /tmp/dev && umount /tmp/proc && umount /tmp/null && echo unmounted
        mount --bind /absent /tmp/dev
        """,
        cmdline="bound",
    )
    assert output == [
        "device",
        "bound",
        "mapper",
        "null",
        "Boot",
        "unmounted",
        "mount: mounting /absent on /tmp/dev failed: No such file or directory",
    ]


PIVOT = """mount -t tmpfs none /newroot; mkdir /newroot/old /newroot/bin /newroot/tmp
cp /bin/busybox /newroot/bin/busybox; cd /newroot
pivot_root /newroot /tmp; pivot_root . old"""


def test_pivot_root_of_the_rootfs(one: Runner) -> None:
    done = boot(one, build_tree(one.place / "tree", f"exec 2>&1\n{PIVOT}\npoweroff -f\n"), "--kernel", "linux-6.12")
    assert [line.rpartition(": ")[2] for line in done.output] == ["Device or resource busy", "Invalid argument"]


def test_pivot_root_where_the_initramfs_is_no_first_root(emu: Runner) -> None:
    """Neither what is mounted after it is gone, nor what gets its mount's number, is taken for it."""
    init = f"""{MOUNTS}exec 2>&1; umount /
cat /etc/allow.pol >$IPE/new_policy; echo 1 >$IPE/policies/Allow/active; {PIVOT}
/old/bin/busybox umount /old; /bin/busybox umount -l /old; /bin/busybox ls /old
exec /bin/busybox sh -c '
for number in 1 2 3; do
    /bin/busybox mount -t tmpfs none /tmp; /bin/busybox cp /bin/busybox /tmp; /tmp/busybox echo $number
done; /bin/busybox poweroff -f'
"""
    policy = (
        "policy_name=Allow policy_version=1.0.0\nDEFAULT action=ALLOW\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
    )
    done = boot(emu, build_tree(emu.place / "tree", init, {"etc/allow.pol": policy}), cmdline="ipe.success_audit=1")
    assert done.status == 0, done.errors
    assert [line.rpartition(": ")[2] for line in done.output] == [
        "Device or resource busy", "Device or resource busy", "Device or resource busy", "1", "2", "3",
    ]  # fmt: skip
    copies = [record for record in done.records if 'path="/tmp/busybox"' in record]
    assert len(copies) == 6  # BPRM_CHECK and MMAP
    assert all('rule="DEFAULT action=ALLOW"' in record and 'dev="tmpfs"' in record for record in copies)


def test_what_is_unknown_here_is_not_passed_over(one: Runner) -> None:
    script = "mount -t btrfs none /tmp; mount -t debugfs none /tmp && ls /tmp"
    output = run_script(one, script, status=4)
    assert output == ["mount: mounting none on /tmp failed: No such device"]


def test_bad_arguments_fail_as_they_do_on_a_kernel(one: Runner) -> None:
    output = run_script(
        one,
        """
        mount -t proc none /absent
        mount -t proc none /etc/file
        busybox umount /etc
        mount -t sysfs -o ro none /sys; mkdir /sys/x
        """,
    )
    assert output == [
        "mount: mounting none on /absent failed: No such file or directory",
        "mount: mounting none on /etc/file failed: No such file or directory",
        "umount: can't unmount /etc: Invalid argument",
        "mkdir: can't create directory '/sys/x': Read-only file system",
    ]


def test_an_overlay_is_not_boot_verified(emu: Runner) -> None:
    output = run_script(
        emu,
        """
        mount -t tmpfs none /tmp; mkdir /tmp/upper /tmp/work /tmp/merged
        mount -t overlay -o lowerdir=/bin,upperdir=/tmp/upper,workdir=/tmp/work none /tmp/merged || echo no overlay
        /tmp/merged/busybox echo never
        cp /bin/busybox /tmp/copy; /tmp/copy echo never
        """,
        status=1,
    )
    assert [line.split(":", 2)[-1].strip() for line in output] == [
        "/tmp/merged/busybox: Permission denied",
        "/tmp/copy: Permission denied",
    ]
