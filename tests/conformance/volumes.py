"""dm-verity volumes for decisions: the files of the initramfs again, as squashfs images with hash trees.

A kernel has them by loop devices and veritysetup, the emulator by ``run --volume``.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from attrs import frozen

from tests.vectors import KEYS

SECONDS = 120.0


@frozen
class Volume:
    """One volume; ``name`` is that of its mount point on /mnt and of its device."""

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

    def open(self, number: int) -> None:
        """Mount it on a kernel, by two loop devices from ``number`` on."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DM_DISABLE_UDEV": "1"}
        data, tree = f"/dev/loop{number}", f"/dev/loop{number + 1}"
        signature = [f"--root-hash-signature={self.signature}"] if self.signature else []
        for command in (
            ["losetup", "-r", data, self.image],
            ["losetup", "-r", tree, self.tree],
            ["veritysetup", "open", *signature, data, self.name, tree, self.root_hash],
            ["mount", "-t", "squashfs", "-o", "ro", f"/dev/mapper/{self.name}", f"/mnt/{self.name}"],
        ):
            subprocess.run(command, check=True, timeout=SECONDS, env=environment)


@functools.cache
def volumes() -> tuple[Volume, ...]:
    """The volumes of this process; made once, and gone when it ends."""
    from tests.conformance.machines import fill  # noqa: PLC0415 - which reads this module's list for its machines

    directory = Path(tempfile.mkdtemp(prefix="ipe-volumes."))
    atexit.register(shutil.rmtree, directory)
    (directory / "files").mkdir()
    fill(directory / "files")
    image = directory / "image"
    _run("mksquashfs", directory / "files", image, "-comp", "gzip", "-noappend", "-quiet", "-no-progress", "-all-root")
    made = []
    for name, algorithm, signed in (("dmv", "sha256", False), ("dmvs", "sha256", True), ("dmv512", "sha512", False)):
        tree = directory / f"{name}.tree"
        said = _run("veritysetup", "format", f"--hash={algorithm}", image, tree)
        root_hash = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))
        signature = None
        if signed:
            (directory / "root-hash").write_text(root_hash)
            signature = str(directory / f"{name}.p7s")
            _run(
                "openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-in", directory / "root-hash",
                "-inkey", KEYS / "trusted.key", "-signer", KEYS / "trusted.pem", "-outform", "der", "-out", signature,
            )  # fmt: skip
        made.append(Volume(name, str(image), str(tree), root_hash, signature))
    return tuple(made)


def _run(program: str, *arguments: str | Path) -> str:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=SECONDS, env=environment
    )
    return done.stdout


def write(path: Path) -> None:
    """Tell another process which volumes there are."""
    path.write_text(json.dumps([[v.name, v.image, v.tree, v.root_hash, v.signature] for v in volumes()]))


def read(path: Path) -> tuple[Volume, ...]:
    """The volumes that `write` told of; none where it did not."""
    return tuple(Volume(*fields) for fields in json.loads(path.read_text())) if path.exists() else ()


def filled_in(text: str) -> str:
    """The text with the root hashes in place of ``{dmv}``, ``{dmvs}`` and ``{dmv512}``."""
    if "{dmv" in text:
        for volume in volumes():
            algorithm = "sha512" if volume.name.endswith("512") else "sha256"
            text = text.replace(f"{{{volume.name}}}", f"{algorithm}:{volume.root_hash}")
    return text
