"""Fetch Debian's own Linux 6.12 as it is shipped for clouds, and make firmware that trusts the tests' keys.

It is kept beside the reference kernels, and used from there without asking the network.
"""

import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from attrs import frozen

from scripts.reference_kernel import TRUSTED_KEYS, Apt, NotReachableError, cache, install_missing, say
from tests.conformance.stock import FIRMWARE, VIRTIOFSD, VIRTIOFSD_OF_QEMU

SERIES = "6.12"
_PACKAGES = r"^linux-image-6\.12\..*-cloud-amd64-unsigned$"
#: What the driver's places need that is no part of the kernel's image, in the order to load it.
_MODULES = (
    "fs/overlayfs/overlay", "drivers/md/dm-mod", "drivers/md/dm-bufio", "lib/reed_solomon/reed_solomon",
    "drivers/md/dm-verity", "drivers/block/loop", "drivers/block/virtio_blk", "fs/squashfs/squashfs",
)  # fmt: skip
_NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86", str(FIRMWARE): "ovmf", "/usr/share/keyrings/debian-archive-keyring.gpg":
    "debian-archive-keyring",
}  # fmt: skip
_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
#: What writes UEFI's variables, and its Python package.
_VIRT_FW_VARS = Path(sys.executable).with_name("virt-fw-vars")
_VIRT_FIRMWARE = "virt-firmware>=24"
#: Owner of the keys in UEFI's lists of signatures: any will do.
_OWNER = "6c8d5dd4-7c5f-4c06-9b0b-7d6c41d0a6a6"


@frozen
class Stock:
    """The kernel, as it was unpacked."""

    home: Path

    @property
    def kernel(self) -> Path:
        """What QEMU boots."""
        return self.home / "vmlinuz"

    @property
    def modules(self) -> tuple[Path, ...]:
        """What to load, in this order."""
        return tuple(self.home / f"{Path(name).name}.ko" for name in _MODULES)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing: another version of this program may have needed less."""
        return all(path.exists() for path in (self.home / "version", *self.modules))

    @property
    def package_version(self) -> str:
        """Debian's version of it."""
        return (self.home / "version").read_text().strip()


def install_what_it_needs() -> None:
    """Install QEMU, the firmware and virtiofsd where they are missing; NotReachableError where that cannot be done."""
    install_missing(_NEEDED, "booting Debian's kernel")
    if not (VIRTIOFSD_OF_QEMU.exists() or VIRTIOFSD.exists()):
        install_missing({str(VIRTIOFSD): "virtiofsd"}, "booting Debian's kernel")
    if not _VIRT_FW_VARS.exists():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", _VIRT_FIRMWARE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotReachableError(f"pip could not install {_VIRT_FIRMWARE}:\n{done.stderr}")


def fetched() -> Stock | None:
    """The newest that is in the cache, with every module."""
    found = [Stock(version.parent) for version in cache().glob("stock-*/version")]
    complete = [stock for stock in found if stock.complete]
    return max(complete, key=lambda stock: (stock.home / "version").stat().st_mtime, default=None)


def fetch() -> Stock:
    """Fetch the newest of this series; NotReachableError where it cannot be had."""
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching.", dir=cache()) as name:
        directory = Path(name)
        apt = Apt(directory / "apt")
        package, version = apt.newest_of(_PACKAGES)
        home = cache() / f"stock-{SERIES}_{version.replace(':', '%')}"
        if Stock(home).complete:
            return Stock(home)
        say(f"fetching {package} {version}")
        file = apt.download(package, version)
        subprocess.run(["dpkg-deb", "-x", file, directory / "files"], check=True, timeout=600)
        ready = directory / "ready"
        ready.mkdir()
        shutil.copy2(next((directory / "files/boot").glob("vmlinuz-*")), ready / "vmlinuz")
        for module in _MODULES:
            packed = next((directory / "files").glob(f"**/kernel/{module}.ko.xz"))
            (ready / f"{Path(module).name}.ko").write_bytes(lzma.decompress(packed.read_bytes()))
        (ready / "version").write_text(version + "\n")
        if home.exists():
            shutil.rmtree(home)
        ready.rename(home)
        return Stock(home)


def ready(variables: Path, *, refresh: bool = False) -> Stock:
    """Get everything: the kernel (a newer one with ``refresh``), the firmware, and its ``variables`` with the keys."""
    install_what_it_needs()
    stock = fetch() if refresh else fetched() or fetch()
    write_variables(variables)
    return stock


def at_hand(variables: Path) -> Stock | None:
    """The same, where nothing need be installed or fetched; else None."""
    needed = [name if name.startswith("/") else shutil.which(name) for name in _NEEDED]
    if not all(path and Path(path).exists() for path in (*needed, _VIRT_FW_VARS)):
        return None
    stock = fetched()
    if stock is not None:
        write_variables(variables)
    return stock


def write_variables(target: Path) -> None:
    """Write the firmware's variables with the tests' trusted keys as its own: db, and the first one as KEK and PK."""
    keys = TRUSTED_KEYS.read_text()
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", keys, re.DOTALL)
    options: list[str | Path] = []
    for number, block in enumerate(blocks):
        file = target.with_name(f"certificate-{number}.pem")
        file.write_text(block)
        if number == 0:
            options += ["--set-pk", _OWNER, file, "--add-kek", _OWNER, file]
        options += ["--add-db", _OWNER, file]
    done = subprocess.run(
        [_VIRT_FW_VARS, "-i", _VARIABLES, "-o", target, *options], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise NotReachableError(f"virt-fw-vars could not write the firmware's variables:\n{done.stderr}")
