"""An initramfs made by Debian's own initramfs-tools for Debian's kernel, from packages, without changing this machine.

The packages are downloaded by apt-get, unpacked into a directory, and mkinitramfs(8) runs there as root of a user
namespace. Two scripts are put where initramfs-tools wants an administrator's: one has veritysetup copied, the other
opens the root that the command line names. The image is kept in ${XDG_CACHE_HOME:-~/.cache}/ipe-emu.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_PACKAGES = (
    "initramfs-tools", "linux-image-cloud-amd64", "udev", "busybox", "cryptsetup-bin", "base-files", "bash", "dash",
    "debianutils", "diffutils", "e2fsprogs", "findutils", "grep", "gzip", "libc-bin", "mawk", "mount", "sed",
    "util-linux",
)  # fmt: skip
_HOOK = """#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
copy_exec /sbin/veritysetup /sbin
"""
_OPEN_ROOT = """#!/bin/sh
[ "$1" = prereqs ] && exit 0
for word in $(cat /proc/cmdline); do
    case $word in roothash=*) veritysetup open /dev/vda root /dev/vdb "${word#roothash=}" ;; esac
done
"""
_SCRIPTS = {"hooks/verity": _HOOK, "scripts/local-top/verity": _OPEN_ROOT}
_MAKE = """
mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" &&
exec chroot "$1" /usr/sbin/mkinitramfs -c gzip -o /initrd.img "$(ls "$1/usr/lib/modules")"
"""


def _apt(place: Path, *arguments: str, own_lists: bool) -> list[str]:
    """The command line of an apt-get that knows no installed package, and writes below ``place`` alone."""
    (place / "lists/partial").mkdir(parents=True, exist_ok=True)
    (place / "archives/partial").mkdir(parents=True, exist_ok=True)
    (place / "status").touch()
    options = {
        "Dir::State::status": place / "status", "Dir::Cache::archives": place / "archives", "APT::Sandbox::User": "",
        "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "", "Debug::NoLocking": "1",
        "APT::Update::Post-Invoke": "", "APT::Install-Recommends": "0",
    }  # fmt: skip
    if own_lists:
        options["Dir::State::lists"] = place / "lists"
    return ["apt-get", "-qq", "-y", *(f"-o{name}={value}" for name, value in options.items()), *arguments]


def _listed(place: Path, *, own_lists: bool) -> str | None:
    """What would be downloaded, None if apt-get does not know."""
    asked = _apt(place, "--print-uris", "install", *_PACKAGES, own_lists=own_lists)
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else None


@cache
def initramfs() -> Path | None:
    """The image, made now or earlier; None where these packages cannot be had."""
    if platform.machine() != "x86_64" or shutil.which("apt-get") is None:
        return None
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipe-emu/debian-initramfs"
    with tempfile.TemporaryDirectory(prefix="ipe-emu-debian.") as name:
        place = Path(name)
        own_lists = False
        listed = _listed(place, own_lists=own_lists)
        if listed is None:  # nobody has ever updated this machine's, or they were thrown away
            own_lists = True
            update = _apt(place, "update", own_lists=own_lists)
            subprocess.run(update, capture_output=True, check=False, timeout=100)
            listed = _listed(place, own_lists=own_lists)
        if listed is None:
            return None
        made_from = hashlib.sha256("\0".join([listed, *_SCRIPTS.values(), _MAKE]).encode()).hexdigest()
        image = kept / f"{made_from[:16]}.img"
        if not image.exists():
            download = _apt(place, "--download-only", "install", *_PACKAGES, own_lists=own_lists)
            if subprocess.run(download, capture_output=True, check=False, timeout=200).returncode:
                return None
            made = _make(place)
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            shutil.move(made, image.with_suffix(".new"))
            image.with_suffix(".new").rename(image)
    return image


def _make(place: Path) -> Path:
    tree = place / "tree"
    for path in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "proc", "tmp", "var/tmp", "etc/modprobe.d"):
        (tree / path).mkdir(parents=True)
    for link in ("bin", "sbin", "lib", "lib64"):
        (tree / link).symlink_to(f"usr/{link}")
    for package in sorted((place / "archives").glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as contents:
            extract = ["tar", "-x", "-C", str(tree), "--keep-directory-symlink", "--no-same-owner"]
            subprocess.run(extract, stdin=contents.stdout, check=True, timeout=60)
    awk = tree / "usr/bin/awk"
    if not awk.is_symlink():
        awk.symlink_to("mawk")  # as the package's script would
    for path, text in _SCRIPTS.items():
        script = tree / "etc/initramfs-tools" / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        script.chmod(0o755)
    make = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MAKE, "sh", str(tree)]
    done = subprocess.run(make, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return tree / "initrd.img"
