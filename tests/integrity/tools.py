"""The programs that tests compare with, and files for both."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from ipe_emu.integrity.dm_verity import DmVerity, Parameters, Superblock

IDENTITY = UUID("12345678-1234-5678-9abc-123456789abc")
#: Where administrators' programs are, which is not on everybody's PATH.
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def tool(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    program = shutil.which(name, path=_PATH)
    assert program is not None, f"scripts/setup installs {name}, and it is not there"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def veritysetup_format(data: Path, hash_image: Path, parameters: Parameters, *options: object) -> str:
    """Format with veritysetup and return the root hash it printed."""
    p = parameters
    done = tool(
        "veritysetup", "format", f"--hash={p.algorithm}", f"--format={p.hash_type}",
        f"--data-block-size={p.data_block_size}", f"--hash-block-size={p.hash_block_size}",
        f"--salt={p.salt.hex() or '-'}", *options, data, hash_image,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash:"))


def open_formatted(root_hash: bytes, data_fd: int, hash_fd: int, offset: int = 0) -> DmVerity:
    """An image whose superblock is at an offset of the hash image."""
    parameters = Superblock.read(hash_fd, offset).parameters
    return DmVerity(parameters, root_hash, data_fd, hash_fd, parameters.tree_offset(offset, superblock=True))


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)
