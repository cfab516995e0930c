"""Making images: single members as bytes, whole archives by the real tools, and looking at what was unpacked."""

import hashlib
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from ipe_emu.linux import openat2
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.image.open import open_image
from ipe_emu.rehearse.image.rootfs import DeviceNode, Unpacked, unpack

#: How each kind of compression is made, by the tool that people make it with.
TOOLS: Mapping[str, Sequence[str]] = {
    "gzip": ["gzip", "-nc"],
    "bzip2": ["bzip2", "-c"],
    "lzma": ["xz", "--format=lzma", "-c"],
    "xz": ["xz", "--check=crc32", "-c"],
    "lzo": ["lzop", "-c"],
    "lz4": ["lz4", "-l", "-c"],
    "zstd": ["zstd", "-q", "-c"],
}
#: What the kernel refuses, though the tool of the format makes it: the tool, and the kernel's message.
REFUSED: Mapping[str, tuple[Sequence[str], str]] = {
    "xz-crc64": (
        ["xz", "-c"],
        "Input was encoded with settings that are not supported by this XZ decoder",
    ),
    "xz-delta": (
        ["xz", "--check=crc32", "--delta", "--lzma2", "-c"],
        "Input was encoded with settings that are not supported by this XZ decoder",
    ),
    "lz4-frame": (["lz4", "-c"], "invalid magic at start of compressed archive"),
    "lzop-without-checksums": (["lzop", "-F", "-c"], "Compressed data violation"),
}

FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
LINK = stat.S_IFLNK | 0o777


def member(
    name: bytes,
    mode: int = FILE,
    data: bytes = b"",
    *,
    magic: bytes = b"070701",
    ino: int = 0,
    uid: int = 0,
    gid: int = 0,
    nlink: int = 1,
    mtime: int = 1000,
    rdev: tuple[int, int] = (0, 0),
    checksum: int = 0,
    name_size: int | None = None,
    size: int | None = None,
    raw: Mapping[int, bytes] | None = None,
) -> bytes:
    """One member; ``name_size`` and ``size`` may lie, and ``raw`` replaces numbers of the header by any eight bytes."""
    text = name + b"\0"
    numbers = (
        ino, mode, uid, gid, nlink, mtime, len(data) if size is None else size, 0, 1, *rdev,
        len(text) if name_size is None else name_size, checksum,
    )  # fmt: skip
    fields = [b"%08x" % number for number in numbers]
    for index, value in (raw or {}).items():
        fields[index] = value
    return padded(padded(magic + b"".join(fields) + text) + data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


TRAILER = member(b"TRAILER!!!", 0)


def compress(command: Sequence[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout


@frozen
class Seen:
    """What a file is: type and permissions, owner, links (of a directory: 0), time, device number, content."""

    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    rdev: tuple[int, int] = (0, 0)
    content: str = ""


def unpack_images(directory: Path, *images: Path, kernel: str = "linux-7.3") -> Unpacked:
    """Unpack into ``directory``, which is made."""
    directory.mkdir()
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with open_image(images, PROFILES[kernel]) as image:
            return unpack(image.members, root)
    finally:
        os.close(root)


def look(directory: Path, unpacked: Unpacked) -> dict[bytes, Seen]:
    """Look at all that was unpacked; device nodes are as the kernel would have made them."""
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    nodes: dict[int, DeviceNode] = {}
    try:
        for node in unpacked.nodes:
            for path in node.paths:
                fd = openat2.open_path(root, path, openat2.RESOLVE_IN_ROOT)
                nodes[os.fstat(fd).st_ino] = node
                os.close(fd)
    finally:
        os.close(root)
    seen = {}
    top = os.fsencode(directory)
    names = [b"/"]
    for path, directories, files in os.walk(top):
        names += [(path + b"/" + name)[len(top) :] for name in directories + files]
    for name in names:
        full = top + name
        found = os.lstat(full)
        links = 0 if stat.S_ISDIR(found.st_mode) else found.st_nlink
        mtime = int(found.st_mtime)
        here = nodes.get(found.st_ino)
        if here is not None:
            seen[name] = Seen(here.mode, here.uid, here.gid, links, mtime, (here.major, here.minor))
            continue
        content = ""
        if stat.S_ISREG(found.st_mode):
            content = hashlib.md5(Path(os.fsdecode(full)).read_bytes()).hexdigest()
        elif stat.S_ISLNK(found.st_mode):
            content = str(Path(os.fsdecode(full)).readlink())
        device = stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)
        rdev = (os.major(found.st_rdev), os.minor(found.st_rdev)) if device else (0, 0)
        seen[name] = Seen(found.st_mode, found.st_uid, found.st_gid, links, mtime, rdev, content)
    return seen
