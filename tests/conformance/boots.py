"""Whole boots for two machines: an initramfs with its init script, of which every audit record is compared.

A script prints what else is to be compared as lines that begin with ``OUT``. It does nothing in the background, for
nobody would know the order of its records. See `booting` for the machines.
"""

import hashlib
import re
import shutil
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from ipe_emu.volumes.recognise import Kind
from tests import vectors
from tests.rehearse.images import MOUNTS, NEW_ROOT, build_tree
from tests.volumes import sealed_images
from tests.volumes.images import Volume, make_volume, protect, tamper
from tests.volumes.sealed_images import FILES

OFF = "/bin/busybox poweroff -f\n"

#: What every policy below allows, for a boot that goes on.
INITRAMFS = "op=EXECUTE boot_verified=TRUE action=ALLOW\n"


def policy(name: str, version: str, rules: str = INITRAMFS, default: str = "DENY") -> str:
    return f"policy_name={name} policy_version={version}\nDEFAULT action={default}\n{rules}"


@frozen
class Boot:
    """An image: what init does, files besides busybox, and policies that ``NAME.p7b`` in /etc are to be signed of.

    ``volume`` is the init script of a root file system on a verity volume, whose data and hash tree are the machine's
    first two disks; ROOT_HASH stands for its root hash in scripts and policies. /etc/root.sig is to be its signature
    by the key ``root_hash_key``, and ``tampered`` has one bit of it wrong. ``disk`` is an ext4 image
    in its place, with its hash tree on the second disk. Disks are read-only unless ``writable``.
    ``builtin_keys``: it is about those that are built into the reference kernels. On the command line, SHA256(NAME)
    stands for the digest of /etc/NAME.p7b. ``headline``: what the first line of its report begins with.
    """

    name: str
    script: str
    files: Mapping[str, str | bytes] = field(factory=dict)
    signed: Mapping[str, tuple[str, str]] = field(factory=dict)
    programs: Sequence[str] = ()
    cmdline: Sequence[str] = ()
    mode: int = 0o755
    volume: str | None = None
    root_hash_key: str | None = None
    tampered: bool = False
    disk: bytes | None = None
    writable: bool = False
    builtin_keys: bool = False
    headline: str = ""

    def build(self, directory: Path) -> "Built":
        """Make the image and its disks."""
        volume = None if self.volume is None else _volume(directory, self.volume)
        if self.disk is not None:
            (directory / "disk.img").write_bytes(self.disk)
            volume = protect(Kind.EXT4, directory / "disk.img")
        root_hash = "" if volume is None else volume.root_hash
        files = dict(self.files)
        if volume is not None and self.tampered:
            tamper(volume.image, volume.image.stat().st_size // 2)
        if self.root_hash_key is not None:
            files["etc/root.sig"] = _sign(directory, self.root_hash_key, root_hash, detached=True)
        for name, (key, text) in self.signed.items():
            files[f"etc/{name}.p7b"] = _sign(directory, key, text.replace("ROOT_HASH", root_hash))
        script = self.script.replace("ROOT_HASH", root_hash)
        tree = build_tree(directory / "tree", script, files, mode=self.mode)
        for program in self.programs:
            _add_program(tree, Path(program))
        image = directory / "image"
        names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        with image.open("wb") as file:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc", "--owner", "0:0"],
                cwd=tree, input=b"".join(sorted(names.splitlines(keepends=True))), stdout=file, check=True, timeout=60,
            )  # fmt: skip
        cmdline = " ".join(self.cmdline)
        for name in self.signed:
            digest = hashlib.sha256((tree / f"etc/{name}.p7b").read_bytes()).hexdigest()
            cmdline = cmdline.replace(f"SHA256({name})", digest)
        disks = () if volume is None else (volume.image, volume.hash_image)
        return Built(image, cmdline, disks, self.writable)


@frozen
class Built:
    """An image, the words of its own on the command line, and its disks, the first of them perhaps writable."""

    image: Path
    cmdline: str
    disks: Sequence[Path]
    writable: bool = False


def _sign(directory: Path, key: str, text: str, *, detached: bool = False) -> bytes:
    plain = directory / "policy.pol"
    plain.write_text(text)
    subprocess.run(
        [
            "openssl", "smime", "-sign", "-in", plain, "-signer", vectors.KEYS / f"{key}.pem",
            "-inkey", vectors.KEYS / f"{key}.key", *([] if detached else ["-nodetach"]), "-noattr", "-nosmimecap",
            "-binary", "-outform", "der", "-out", directory / "policy.p7b",
        ],
        check=True, timeout=60, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return (directory / "policy.p7b").read_bytes()


def _volume(directory: Path, init: str) -> Volume:
    tree = build_tree(directory / "root", init)
    (tree / "etc/plain").write_text("a file\n")
    return make_volume(Kind.SQUASHFS, tree, directory)


def _add_program(tree: Path, program: Path) -> None:
    """Copy a program of this machine, with the libraries that it names."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=60).stdout
    for path in {program, *map(Path, re.findall(r"(/\S+) \(", listed))}:
        (tree / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / path.relative_to("/"))


def _der(name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert((vectors.KEYS / f"{name}.pem").read_text())


_GOES_ON = policy("GoesOn", "1.0.0")

VOLUME = "op=EXECUTE dmverity_roothash=sha256:ROOT_HASH action=ALLOW\n"
SIGNED = "op=EXECUTE dmverity_signature=TRUE action=ALLOW\n"
#: User-Mode Linux calls its disks ubda and ubdb.
_DISK = "disk=/dev/vd; [ -b /dev/vda ] || disk=/dev/ubd"
OPEN = f"""{_DISK}
veritysetup open ${{disk}}a root ${{disk}}b ROOT_HASH"""

#: Of files on the images of tests/volumes/sealed_images.py.
_SEALED = f"""op=EXECUTE fsverity_digest={FILES["hello"].digest()} action=ALLOW
op=EXECUTE fsverity_signature=TRUE action=ALLOW
"""
_NOT_SEALED = f"""op=EXECUTE fsverity_signature=TRUE action=DENY
op=EXECUTE fsverity_digest={FILES["other"].digest()} action=DENY
"""

#: A root to pivot into.
_PIVOTED = """mount -t tmpfs none /newroot; mkdir /newroot/old /newroot/bin /newroot/tmp
cp /bin/busybox /newroot/bin; cd /newroot
"""
#: Of which none may be taken for a mount that is gone.
_MANY_TMPFS = """for number in 1 2 3 4 5 6; do
    /bin/busybox mount -t tmpfs none /tmp; /bin/busybox cp /bin/busybox /tmp; /tmp/busybox true; echo OUT $number $?
done
"""

BOOTS = (
    Boot(
        "copies and mounts",
        f"""{MOUNTS}ls / >/dev/null
cp /bin/busybox /tmp/x; /tmp/x true; echo OUT copy $?
mount -t tmpfs t /tmp; cp /bin/busybox /tmp/y; /tmp/y true; echo OUT tmpfs $?
mkdir /b; mount --bind /bin /b; /b/busybox true; echo OUT bind $?
mount -o bind,noexec /bin /b; /b/busybox true; echo OUT noexec $?
mkdir /m; mount -t tmpfs m /m; cp /bin/busybox /m; mkdir /n; mount --move /m /n; /n/busybox true; echo OUT moved $?
chroot / /bin/true; echo OUT chroot $?
{OFF}""",
    ),
    Boot(
        "enforcement off and on",
        f"""{MOUNTS}mount -t tmpfs t /tmp; cp /bin/busybox /tmp/y
echo 0 >$IPE/enforce; /tmp/y true; echo OUT off $?
echo 1 >$IPE/enforce; /tmp/y true; echo OUT on $?
echo 1 >$IPE/enforce; echo 2 >$IPE/enforce; echo OUT bad $?
echo 0 >$IPE/success_audit; /bin/true; echo 1 >$IPE/success_audit; /bin/true
setuidgid 1000 sh -c 'echo 0 >/sys/kernel/security/ipe/enforce'; echo OUT user $?
cat $IPE/enforce $IPE/success_audit; echo
{OFF}""",
    ),
    Boot(
        "permissive from the start",
        f"{MOUNTS}mount -t tmpfs t /tmp; cp /bin/busybox /tmp/y; /tmp/y true; echo OUT $?\n{OFF}",
        cmdline=("ipe.enforce=0",),
    ),
    Boot(
        "scripts",
        f"""{MOUNTS}for program in /t/nested /t/lost /t/garbage /t/empty /t/plain /t /t/link /t/deep /proc/self/exe; do
    $program; echo OUT $program $?
done
ln -s /bin/busybox /t/true; /t/true; echo OUT true $?
{OFF}""",
        {
            "t/script": "#!/bin/sh\necho OUT a script\n", "t/nested": "#!/t/script x\n", "t/deep": "#!/t/nested\n",
            "t/lost": "#!/no/such/interpreter\n", "t/garbage": "no program at all\n", "t/empty": "",
        },
    ),
    Boot(
        "a signed policy takes over",
        f"""{MOUNTS}cat /etc/goes-on.p7b >$IPE/new_policy; echo OUT load $?
ls $IPE/policies | while read -r name; do echo OUT $name; done
echo 1 >$IPE/policies/AllowInitramfs/delete; echo OUT delete the active $?
echo 1 >$IPE/policies/GoesOn/active; echo OUT activate $?
echo 1 >$IPE/policies/AllowInitramfs/delete; echo OUT delete $?
cat /etc/newer.p7b >$IPE/policies/GoesOn/update; echo OUT update $?
cat /etc/goes-on.p7b >$IPE/policies/GoesOn/update; echo OUT older $?
cat /etc/other.p7b >$IPE/policies/GoesOn/update; echo OUT name $?
cat /etc/goes-on.p7b >$IPE/new_policy; echo OUT again $?
/bin/true; echo OUT run $?
{OFF}""",
        signed={
            "goes-on": ("trusted", _GOES_ON), "newer": ("trusted", policy("GoesOn", "1.0.1")),
            "other": ("trusted", policy("Other", "2.0.0")),
        },
    ),
    Boot(
        "policies that are refused",
        f"""{MOUNTS}cat /etc/untrusted.p7b >$IPE/new_policy; echo OUT untrusted $?
echo junk >$IPE/new_policy; echo OUT junk $?
head -c 300 /etc/good.p7b >$IPE/new_policy; echo OUT cut $?
dd if=/etc/large.p7b of=$IPE/new_policy bs=8192; echo OUT pieces $?
cat /etc/bad.p7b >$IPE/new_policy; echo OUT syntax $?
cat /etc/old.p7b >$IPE/new_policy; echo OUT old $?; echo 1 >$IPE/policies/AllowInitramfs/active; echo OUT $?
cat /etc/good.p7b >$IPE/new_policy; echo OUT good $?
{OFF}""",
        signed={
            "untrusted": ("untrusted", _GOES_ON), "good": ("trusted", _GOES_ON),
            "bad": ("trusted", _GOES_ON + "op=NO\n"),
            "large": ("trusted", policy("Large", "1.0.0", INITRAMFS + "# filling\n" * 900)),
            "old": ("trusted", policy("AllowInitramfs", "0.0.0")),
        },
    ),
    Boot(
        "a policy that does not trust the initramfs",
        f"""{MOUNTS}cat /etc/lock.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Lock/active; echo OUT activated $?
/bin/true; echo OUT true $?
/bin/busybox poweroff -f; echo OUT poweroff $?
""",
        signed={"lock": ("trusted", policy("Lock", "1.0.0", SIGNED))},
    ),
    Boot(
        "a new root on a tmpfs",
        f"""{MOUNTS}cat /etc/open.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Open/active
{NEW_ROOT}
umount /sys/kernel/security /sys /proc /dev
exec switch_root /newroot /init
""",
        {"etc/newinit": f"#!/bin/sh\nexport PATH=/bin\necho OUT in the new root\n/bin/busybox true\n{OFF}"},
        {"open": ("trusted", policy("Open", "1.0.0", "op=EXECUTE boot_verified=TRUE action=DENY\n", "ALLOW"))},
    ),
    Boot(
        "a new root that is not trusted",
        f"{MOUNTS}{NEW_ROOT}\numount /sys/kernel/security /sys /proc /dev\nexec switch_root /newroot /init\n",
        {"etc/newinit": f"#!/bin/sh\necho OUT not reached\n{OFF}"},
    ),
    Boot(
        "pivot_root of the first root",
        f"""{MOUNTS}do_() {{ "$@" >/tmp/said 2>&1; echo OUT "$* = $?"; sed 's/^/OUT   /' /tmp/said; }}
mkdir /b /c; export PATH=/bin:/old/bin
do_ pivot_root . .; do_ pivot_root / /tmp; do_ pivot_root /none /newroot; do_ pivot_root /newroot /none; do_ umount /
{_PIVOTED}do_ pivot_root /newroot /tmp; do_ pivot_root /tmp /newroot; do_ pivot_root /newroot/bin /newroot
mount --bind /newroot /b; do_ pivot_root /b/bin /b; mount --bind /newroot/bin /c; do_ pivot_root /c /newroot/old
do_ pivot_root . old; do_ /old/bin/busybox true; do_ /bin/busybox true
do_ pwd -P; do_ readlink /old/proc/self/root; do_ readlink /old/proc/self/exe
do_ umount /old; do_ pivot_root /old /old/newroot; do_ pwd -P; do_ /bin/busybox true; do_ /newroot/bin/busybox true
{OFF}""",
    ),
    Boot(
        "a first root that is detached",
        f"""{MOUNTS}cat /etc/any.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Any/active
{_PIVOTED}pivot_root . old; echo OUT pivoted $?
/bin/busybox umount -l /old; echo OUT detached $?
/bin/busybox ls /old; /bin/busybox true; echo OUT true $?
exec /bin/busybox sh -c '{_MANY_TMPFS}/bin/busybox poweroff -f'
""",
        signed={
            "any": ("trusted", policy("Any", "1.0.0", INITRAMFS + "op=EXECUTE boot_verified=FALSE action=ALLOW\n")),
        },
    ),
    Boot(
        "a first root that is unmounted",
        f"""{MOUNTS}{_PIVOTED}cat /etc/else.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Else/active
pivot_root . old; echo OUT pivoted $?
exec /bin/busybox sh -c '
for name in sys/kernel/security sys dev proc; do /bin/busybox umount /old/$name; echo OUT $name $?; done
/bin/busybox umount /old; echo OUT unmounted $?; /bin/busybox umount -l /old; echo OUT detached $?
{_MANY_TMPFS}/bin/busybox poweroff -f'
""",
        signed={"else": ("trusted", policy("Else", "1.0.0", "op=EXECUTE boot_verified=TRUE action=DENY\n", "ALLOW"))},
    ),
    Boot(
        "an overlay over the initramfs",
        f"""{MOUNTS}mkdir /o /w; mount -t tmpfs w /w; mkdir /w/u /w/w
mount -t overlay -o lowerdir=/bin,upperdir=/w/u,workdir=/w/w o /o; echo OUT mounted $?
/o/busybox true; echo OUT lower $?
cp /bin/busybox /o/copy; /o/copy true; echo OUT upper $?
{OFF}""",
    ),
    Boot(
        "files that a disk has sealed",
        f"""{MOUNTS}export PATH=/bin:/usr/bin
disk=/dev/vda; [ -b $disk ] || disk=/dev/ubda
mkdir /d /o /w; mount -t ext4 -o ro $disk /d; echo OUT mounted $?
try() {{ for name in hello other plain signed stranger; do $1/$name; echo OUT $1 $name $?; done; }}
cat /etc/seals.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Seals/active; try /d
keyctl padd asymmetric '' %:.fs-verity </etc/trusted.der; umount /d; mount -t ext4 -o ro $disk /d; try /d
mount -t tmpfs w /w; mkdir /w/u /w/w; mount -t overlay -o lowerdir=/d,upperdir=/w/u,workdir=/w/w o /o; try /o
cp /d/hello /w/hello; /w/hello; echo OUT copy $?; cat /o/hello >/o/more; chmod 755 /o/more; /o/more; echo OUT upper $?
chmod 700 /o/hello; /o/hello; echo OUT copied up $?
cat /etc/not.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Not/active; try /d; try /o
measure() {{ fsverity measure $1 >/w/said 2>&1; echo OUT measure $? $(sed 's/.*: //; s/ .*//' /w/said); }}
measure /d/hello; measure /d/salted; measure /d/plain; measure /o/other; measure /w/hello; measure /d
enable() {{ fsverity enable "$@" >/w/said 2>&1; echo OUT enable $? $(sed 's/.*: //' /w/said); }}
enable /d/plain; enable /d/hello; enable /o/other; enable /w/hello; enable /d; enable /d/plain --block-size=3
fsverity dump_metadata signature /d/signed >/w/said; cmp /w/said /etc/signature; echo OUT signature $?
fsverity dump_metadata merkle_tree /d/salted >/w/said; md5sum /w/said >/w/sum; sed 's/^/OUT /' /w/sum
fsverity dump_metadata descriptor /d/signed >/w/said; md5sum /w/said >/w/sum; sed 's/^/OUT /' /w/sum
fsverity dump_metadata signature /d/hello >/w/said 2>&1; echo OUT $? $(sed 's/.*: //' /w/said)
{OFF}""",
        {"etc/trusted.der": _der("trusted"), "etc/signature": FILES["signed"].signature()},
        {
            "seals": ("trusted", policy("Seals", "1.0.0", INITRAMFS + _SEALED)),
            "not": ("trusted", policy("Not", "1.0.0", _NOT_SEALED, "ALLOW")),
        },
        programs=("/usr/bin/keyctl", "/usr/bin/fsverity"),
        disk=sealed_images.image(4096),
    ),
    Boot(
        "a disk that is mounted for writing",
        f"""{MOUNTS}export PATH=/bin:/usr/bin:/usr/sbin
{_DISK}
mkdir /d /e; mount -t ext4 -o ro ${{disk}}a /d; echo OUT for reading $?
mount -t ext4 ${{disk}}a /e; echo OUT for writing beside $?
mount -t ext4 -o ro ${{disk}}a /e; echo OUT for reading beside $?; umount /d /e
{OPEN}; echo OUT open $?; mount -t ext4 -o ro /dev/mapper/root /d; echo OUT of the volume $?
/d/hello; echo OUT hello $?; umount /d; veritysetup close root; echo OUT close $?
mount -t ext4 ${{disk}}a /d; echo OUT for writing $?; /d/hello; echo OUT hello $?
mount -t ext4 -o ro ${{disk}}a /e; echo OUT for reading beside $?
mount -t ext4 ${{disk}}a /e; echo OUT for writing beside $?; umount /d /e
{OPEN}; echo OUT open $?; mount -t ext4 -o ro /dev/mapper/root /d; echo OUT of the volume $?
/d/hello; echo OUT hello $?
{OFF}""",
        signed={"volume": ("trusted", policy("Volume", "1.0.0", INITRAMFS + VOLUME))},
        programs=("/usr/sbin/veritysetup",),
        disk=sealed_images.image(4096),
        writable=True,
    ),
    Boot(
        "programs with libraries",
        f"""{MOUNTS}/usr/bin/bash -c 'echo OUT bash; exec /usr/bin/env true'; echo OUT $?
mount -t tmpfs t /tmp; cp /usr/bin/bash /tmp/bash; /tmp/bash -c true; echo OUT copy $?
cp $(ls /lib/x86_64-linux-gnu/libtinfo.so.6) /tmp; LD_LIBRARY_PATH=/tmp /usr/bin/bash -c true; echo OUT library $?
cp /lib64/ld-linux-x86-64.so.2 /tmp/ld; /tmp/ld /usr/bin/bash -c true; echo OUT ld $?
/lib64/ld-linux-x86-64.so.2 /tmp/bash -c true; echo OUT ld of a copy $?
{OFF}""",
        programs=("/usr/bin/bash", "/usr/bin/env", "/usr/bin/true"),
    ),
    Boot(
        "the kernel's keyrings",
        f"""{MOUNTS}export PATH=/bin:/usr/bin
first() {{ sed '1!d; s/^ *[0-9]*[0-9]: //; s/[0-9]\\{{6,\\}}/N/g; s/^/OUT /' $1; }}
show() {{ "$@" >/tmp/shown 2>&1; status=$?; echo "OUT $ring: $1 $2 = $status"; first /tmp/shown; }}
add() {{ keyctl padd asymmetric "$1" %:$ring <$2 >/tmp/id 2>/tmp/why; echo OUT $ring takes $2: $?; first /tmp/why; }}
for ring in .builtin_trusted_keys .secondary_trusted_keys .fs-verity .dm-verity; do
    show keyctl rdescribe %:$ring
    grep " $ring: " /proc/keys >/tmp/line; sed 's/^[0-9a-f]* \\(.\\).* perm/\\1 perm/; s/^/OUT /' /tmp/line
    for certificate in leaf trusted untrusted; do
        add '' /etc/$certificate.der
        grep "$(printf %08x $(cat /tmp/id))" /proc/keys >/tmp/line; sed 's/^.* perm/perm/; s/^/OUT /' /tmp/line
        read id </tmp/id; show keyctl read $id
    done
    add mine /etc/junk; add mine /etc/leaf.der; add mine /etc/trusted.der
    show keyctl rlist %:$ring
    show keyctl search %:$ring asymmetric nobody; show keyctl search %:$ring asymmetric mine
    show keyctl search %:$ring keyring .builtin_trusted_keys
    show setuidgid 1000 keyctl rdescribe %:$ring; show setuidgid 1000 keyctl restrict_keyring %:$ring
    show keyctl restrict_keyring %:$ring asymmetric nonsense; show keyctl restrict_keyring %:$ring keyring nonsense
    show keyctl restrict_keyring %:$ring; show keyctl restrict_keyring %:$ring
    add '' /etc/ec.der
    show keyctl setperm %:$ring 0x082f0000; show keyctl setperm %:$ring 0x40000000
    show keyctl link %:$ring @s; show keyctl unlink %:.builtin_trusted_keys %:.fs-verity
    show keyctl unlink "$id" %:$ring
    [ $ring = .secondary_trusted_keys ] || show keyctl clear %:$ring
done
{OFF}""",
        {**{f"etc/{name}.der": _der(name) for name in ("leaf", "trusted", "untrusted", "ec")}, "etc/junk": "junk"},
        programs=("/usr/bin/keyctl",),
        cmdline=("ipe.success_audit=0", "dm_verity.keyring_unsealed=1"),
        builtin_keys=True,
    ),
    Boot(
        "a verity root by its root hash",
        f"""{MOUNTS}export PATH=/bin:/usr/sbin
{OPEN}; echo OUT opened $?
mount -t squashfs -o ro /dev/mapper/root /newroot; echo OUT mounted $?
/newroot/bin/busybox true; echo OUT before $?
cat /etc/both.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Both/active; echo OUT activated $?
/newroot/bin/busybox true; echo OUT after $?
cat /etc/root.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Root/active; echo OUT root alone $?
/bin/true; echo OUT the initramfs $?
/newroot/bin/busybox umount /sys/kernel/security; /newroot/bin/busybox umount /sys
exec /newroot/bin/busybox switch_root /newroot /init
""",
        signed={
            "both": ("trusted", policy("Both", "1.0.0", INITRAMFS + VOLUME)),
            "root": ("trusted", policy("Root", "1.0.0", VOLUME)),
        },
        programs=("/usr/sbin/veritysetup",),
        volume=f"""mount -t tmpfs t /tmp; echo OUT tmpfs $?
cp /bin/busybox /tmp/x; /tmp/x true; echo OUT copy $?
/bin/true; echo OUT in the new root $?
/init.d/none; echo OUT none $?
{OFF}""",
    ),
    Boot(
        "a verity root that nobody signed",
        f"""{MOUNTS}export PATH=/bin:/usr/sbin
{OPEN}; echo OUT opened $?
mount -t squashfs -o ro /dev/mapper/root /newroot; echo OUT mounted $?
cat /etc/signed.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Signed/active; echo OUT activated $?
/newroot/bin/busybox true; echo OUT executed $?
mount -t overlay -o lowerdir=/newroot,upperdir=/u,workdir=/w o /o; echo OUT overlay $?
/o/bin/busybox true; echo OUT executed $?
{OFF}""",
        {"u/none": "", "w/none": "", "o/none": ""},
        {"signed": ("trusted", policy("Signed", "1.0.0", INITRAMFS + SIGNED))},
        programs=("/usr/sbin/veritysetup",),
        volume=OFF,
    ),
    Boot(
        "a verity root with a signature",
        f"""{MOUNTS}export PATH=/bin:/usr/sbin
cat /etc/signed.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Signed/active; echo OUT activated $?
{OPEN} --root-hash-signature=/etc/root.sig; echo OUT with a signature $?
mount -t squashfs -o ro /dev/mapper/root /newroot; echo OUT mounted $?
/newroot/bin/busybox true; echo OUT executed $?
{OFF}""",
        signed={"signed": ("trusted", policy("Signed", "1.0.0", INITRAMFS + SIGNED))},
        programs=("/usr/sbin/veritysetup",),
        volume=OFF,
        root_hash_key="trusted",
    ),
    Boot(
        "a verity root signed by a stranger",
        f"""{MOUNTS}export PATH=/bin:/usr/sbin
{OPEN} --root-hash-signature=/etc/root.sig; echo OUT with a signature $?
{OFF}""",
        programs=("/usr/sbin/veritysetup",),
        volume=OFF,
        root_hash_key="untrusted",
    ),
    Boot(
        "a tampered verity root",
        f"""{MOUNTS}export PATH=/bin:/usr/sbin
{OPEN}; echo OUT opened $?
cat /etc/both.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Both/active; echo OUT activated $?
mount -t squashfs -o ro /dev/mapper/root /newroot; echo OUT mounted $?
cat /newroot/bin/busybox >/dev/null; echo OUT read $?
{OFF}""",
        signed={"both": ("trusted", policy("Both", "1.0.0", INITRAMFS + VOLUME))},
        programs=("/usr/sbin/veritysetup",),
        volume=OFF,
        tampered=True,
    ),
    Boot("an init that may not be executed", OFF, {"sbin/init": f"#!/bin/sh\necho OUT instead\n{OFF}"}, mode=0o644),
    Boot("an init that ends", "echo OUT going\nsleep 1\nexit 3\n"),
    Boot("another init", "echo OUT not this one\n", {"etc/other": f"#!/bin/sh\necho OUT $0 $1\n{OFF}"},
         cmdline=("rdinit=/etc/other", "--", "argument")),
)  # fmt: skip
