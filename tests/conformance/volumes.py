"""dm-verity volumes for decisions: the files of the initramfs again, as squashfs images with hash trees (media.py)."""

import functools
import json
import os
import subprocess
from pathlib import Path

from ipe_emu.pkcs7.sign import sign_detached
from tests.conformance import files
from tests.conformance.media import SECONDS, VOLUMES, Volume
from tests.vectors import KEYS


@files.once
def volumes() -> tuple[Volume, ...]:
    """The volumes of this process; made once, and gone when it ends."""
    directory = files.kept("volumes")
    files.fill(directory / "files")
    image = directory / "image"
    _run("mksquashfs", directory / "files", image, "-comp", "gzip", "-noappend", "-quiet", "-no-progress", "-all-root")
    made = []
    for name, algorithm, signed in (("dmv", "sha256", False), ("dmvs", "sha256", True), ("dmv512", "sha512", False)):
        tree = directory / f"{name}.tree"
        said = _run("veritysetup", "format", f"--hash={algorithm}", image, tree)
        root_hash = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))
        signature = None
        if signed:
            signature = str(directory / f"{name}.p7s")
            key, certificate = ((KEYS / f"trusted.{suffix}").read_bytes() for suffix in ("key", "pem"))
            Path(signature).write_bytes(sign_detached(root_hash.encode(), key, certificate))
        made.append(Volume(name, str(image), str(tree), root_hash, signature))
    return tuple(made)


def _run(program: str, *arguments: str | Path) -> str:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=SECONDS, env=environment
    )
    return done.stdout


def write(work: Path) -> None:
    """Tell another process which volumes there are."""
    told = [[v.name, v.image, v.tree, v.root_hash, v.signature] for v in volumes()]
    (work / VOLUMES).write_text(json.dumps(told))


@functools.cache
def root_hash(name: str) -> str:
    """A volume's root hash, as policies have it."""
    algorithm = "sha512" if name.endswith("512") else "sha256"
    return f"{algorithm}:{next(volume.root_hash for volume in volumes() if volume.name == name)}"
