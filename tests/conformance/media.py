"""What decisions are about besides the initramfs: volumes on dm-verity, and files sealed by fs-verity.

Here is what a machine does with them, and little is imported for it; volumes.py and seals.py make them.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from attrs import frozen

SECONDS = 120.0
#: What a machine is told, beside its batch.
VOLUMES, SEALS, IMAGE, CERTIFICATE = "volumes.json", "seals.json", "fsv.ext4", "fsv.der"
#: Where files can be sealed. Those that are sealed from the first are in ``layers/KIND/bin``; sequences use ``new``.
SEALABLE = "/mnt/fsv"


@frozen
class Volume:
    """A squashfs image with its hash tree; ``name`` is that of its mount point on /mnt and of its device."""

    name: str
    image: str
    tree: str
    root_hash: str
    signature: str | None

    @property
    def option(self) -> str:
        """What ``run --volume`` takes."""
        signature = f",signature={self.signature}" if self.signature else ""
        return f"/mnt/{self.name}={self.image},roothash={self.root_hash},hash={self.tree}{signature}"

    def mount(self, number: int) -> None:
        """Mount it on a kernel, by two loop devices from ``number`` on."""
        Path("/mnt", self.name).mkdir()
        data, tree = f"/dev/loop{number}", f"/dev/loop{number + 1}"
        signature = [f"--root-hash-signature={self.signature}"] if self.signature else []
        for command in (
            ["losetup", "-r", data, self.image],
            ["losetup", "-r", tree, self.tree],
            ["veritysetup", "open", *signature, data, self.name, tree, self.root_hash],
            ["mount", "-t", "squashfs", "-o", "ro", f"/dev/mapper/{self.name}", f"/mnt/{self.name}"],
        ):
            _run(command)


def volumes(work: Path) -> tuple[Volume, ...]:
    """The volumes that a machine is told of."""
    return tuple(Volume(*fields) for fields in _told(work / VOLUMES))


def seals(work: Path) -> list[dict[str, Any]]:
    """The files that the driver is to seal, and how."""
    return _told(work / SEALS)


def _told(path: Path) -> list[Any]:
    told: list[Any] = json.loads(path.read_text()) if path.exists() else []
    return told


def mount_sealable(work: Path) -> None:
    """Mount the file system with fs-verity on a kernel."""
    Path(SEALABLE).mkdir()
    _run(["losetup", "/dev/loop0", str(work / IMAGE)])
    _run(["mount", "-t", "ext4", "/dev/loop0", SEALABLE])


def _run(command: list[str]) -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DM_DISABLE_UDEV": "1"}
    subprocess.run(command, check=True, timeout=SECONDS, env=environment)
