"""Record how kernels answer for ext4 images with files that are sealed by fs-verity, for tests/vectors.

usage: python -m scripts.record_ext4_seals images | answers SERIES [SEED]

``images`` has a User-Mode Linux (scripts/reference_kernel.py) make and seal the files of two images, and writes them to
tests/vectors/ext4-seals-BLOCKSIZE.img.xz. ``answers`` puts these images to the kernel of that series, as they are and
with some bytes changed at random, and prints a line for each: what was changed, and the answer for every file, or for
those alone that it changed.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import reference_kernel
from tests import vectors
from tests.conformance.machines import packed
from tests.volumes.sealed_images import BLOCK_SIZES, FILES, IMAGES, regions, without_feature

ROOT = Path(__file__).parent.parent
_ENABLE, _MEASURE, _READ_METADATA = 0x40806685, 0xC0046686, 0xC0286687
_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t hostfs -o / none /host
$b mount -t proc proc /host/proc
$b mount -t devtmpfs dev /host/dev
$b mount -t tmpfs -o mode=755 tmpfs /host/mnt
$b mkdir /host/mnt/image /host/mnt/work
$b mount -t hostfs -o {work} none /host/mnt/work
$b chroot /host /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C PYTHONDONTWRITEBYTECODE=1 \\
    PYTHONPATH={root}:{root}/fs {python} -m scripts.record_ext4_seals in-the-machine {task}
$b poweroff -f
"""
_CHANGES = 200


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    if arguments[0] == "in-the-machine":
        return _make() if arguments[1] == "images" else _answer()
    series = "6.12" if arguments[0] == "images" else arguments[1]
    kernel = reference_kernel.built(series)
    if kernel is None:
        sys.exit(f"make reference-kernel builds Linux {series}")
    with tempfile.TemporaryDirectory(prefix="ipe-ext4.") as name:
        work = Path(name)
        if arguments[0] == "images":
            _images(kernel.program, work)
        else:
            _answers(kernel.program, work, int(arguments[2]) if len(arguments) > 2 else 1)
    return None


def _images(kernel: Path, work: Path) -> None:
    for size in BLOCK_SIZES:
        # Without checksums in one of them: there, a kernel looks at inodes and extents that were changed.
        features = "verity" if size == max(BLOCK_SIZES) else "verity,^metadata_csum,^64bit"
        subprocess.run(
            [
                "mke2fs", "-q", "-t", "ext4", "-b", str(size), "-I", "256", "-N", "64",
                "-O", f"{features},^has_journal", "-U", "clear", work / f"{size}.img", "4M",
            ],
            check=True, timeout=60, env=os.environ | {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
        )  # fmt: skip
    _boot(kernel, work, "images")
    for size in BLOCK_SIZES:
        image = (work / f"{size}.img").read_bytes()
        (IMAGES / f"ext4-seals-{size}.img.xz").write_bytes(lzma.compress(image, preset=9 | lzma.PRESET_EXTREME))


def _answers(kernel: Path, work: Path, seed: int) -> None:
    tasks: list[dict[str, Any]] = []
    for size in BLOCK_SIZES:
        image = lzma.decompress((IMAGES / f"ext4-seals-{size}.img.xz").read_bytes())
        (work / f"{size}.img").write_bytes(image)
        changes = [[], *_changes(image, random.Random(seed * size))]
        if size < max(BLOCK_SIZES):  # whose superblock has no checksum
            changes.append([without_feature(image)])
        tasks += [{"image": size, "patches": patches} for patches in changes]
    (work / "tasks.json").write_text(json.dumps(tasks))
    _boot(kernel, work, "answers")
    print((work / "answers.jsonl").read_text(), end="")


def _changes(image: bytes, source: random.Random) -> Iterator[list[tuple[int, str]]]:
    found = regions(image)
    for _ in range(_CHANGES):
        offset, length = source.choice(found[source.choice(sorted(found))])
        position = offset + source.randrange(length)
        value = source.choice([image[position] ^ 1 << source.randrange(8), source.randrange(256), 0, 255])
        yield [(position, f"{value:02x}")]


def _boot(kernel: Path, work: Path, task: str) -> None:
    tree = work / "tree"
    for name in ("bin", "host"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy2(busybox, tree / "bin" / "busybox")
    (tree / "init").write_text(_INIT.format(work=work, root=ROOT, python=sys.executable, task=task))
    (tree / "init").chmod(0o755)
    (work / "initramfs").write_bytes(packed(tree))
    done = subprocess.run(
        [
            kernel, "mem=320M", f"initrd={work / 'initramfs'}", "con0=fd:0,fd:1", "con=null", "quiet", "ipe.enforce=0",
            "panic=-1", f"uml_dir={work}",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=1800, check=False, cwd=work,
    )  # fmt: skip
    if not (work / "done").exists():
        sys.exit(f"the kernel came to no end:\n{done.stdout.decode(errors='replace')[-4000:]}")


# -- in the machine ---------------------------------------------------------------------------------------------

WORK, MOUNT = Path("/mnt/work"), Path("/mnt/image")
COPY = Path("/mnt/copy.img")


def _mount(image: Path, options: str) -> str | None:
    done = subprocess.run(
        ["busybox", "mount", "-t", "ext4", "-o", f"loop,{options}", image, MOUNT],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return None if done.returncode == 0 else done.stderr.strip().rpartition(": ")[2]


def _unmount() -> None:
    subprocess.run(["busybox", "umount", "-d", MOUNT], check=True, timeout=60)


def _trust(*names: str) -> None:
    """Put certificates into the keyring .fs-verity."""
    keyring = next(
        int(line.split()[0], 16) for line in Path("/proc/keys").read_text().splitlines() if " .fs-verity" in line
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for name in names:
        der = subprocess.run(
            ["openssl", "x509", "-in", vectors.KEYS / f"{name}.pem", "-outform", "der"],
            capture_output=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        # add_key(2), on x86_64.
        assert libc.syscall(248, b"asymmetric", b"", der, ctypes.c_size_t(len(der)), keyring) > 0


def _make() -> None:
    _trust("trusted", "untrusted")
    for size in BLOCK_SIZES:
        shutil.copy(WORK / f"{size}.img", COPY)
        assert _mount(COPY, "rw") is None
        for name, file in FILES.items():
            if file.block_size > size:
                continue
            path = MOUNT / name
            path.parent.mkdir(exist_ok=True)
            file.write(path)
            os.utime(path, (1, 1))
            if file.is_sealed:
                _enable(path, file.number, file.block_size, file.salt, file.signature())
        (MOUNT / "lost+found").rmdir()
        _unmount()
        shutil.copy(COPY, WORK / f"{size}.img")
    (WORK / "done").touch()


def _enable(path: Path, algorithm: int, block_size: int, salt: bytes, signature: bytes) -> None:
    salted, signed = ctypes.create_string_buffer(salt, 32), ctypes.create_string_buffer(signature, 1 << 14)
    argument = struct.pack(
        "=IIIIQIIQ88x", 1, algorithm, block_size, len(salt), ctypes.addressof(salted), len(signature), 0,
        ctypes.addressof(signed),
    )  # fmt: skip
    fd = os.open(path, os.O_RDONLY)
    fcntl.ioctl(fd, _ENABLE, argument)
    os.close(fd)


def _answer() -> None:
    _trust("trusted")
    with (WORK / "answers.jsonl").open("w") as out:
        unchanged: dict[str, Any] = {}
        for task in json.loads((WORK / "tasks.json").read_text()):
            shutil.copy(WORK / f"{task['image']}.img", COPY)
            with COPY.open("r+b") as file:
                for position, value in task["patches"]:
                    file.seek(position)
                    file.write(bytes.fromhex(value))
            fault = _mount(COPY, "ro")
            files = {}
            if fault is None:
                files = {name: _outcomes(MOUNT / name) for name in FILES if FILES[name].block_size <= task["image"]}
                _unmount()
            if task["patches"]:
                files = {name: answer for name, answer in files.items() if answer != unchanged[name]}
            else:
                unchanged = files
            out.write(json.dumps(task | {"mount": fault, "files": files}) + "\n")
    (WORK / "done").touch()


def _outcomes(path: Path) -> dict[str, Any]:
    try:
        inode = path.stat().st_ino
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        return {"open": errno.errorcode[error.errno or 0]}
    try:
        return {
            "open": 0,
            "inode": inode,
            "read": _outcome(lambda: hashlib.sha256(b"".join(iter(lambda: os.read(fd, 65536), b""))).hexdigest()),
            "measure": _outcome(lambda: _measure(fd)),
            "signature": _outcome(lambda: _signature(fd)),
        }
    finally:
        os.close(fd)


def _outcome(function: Callable[[], str]) -> str | dict[str, str]:
    try:
        return function()
    except OSError as error:
        return {"error": errno.errorcode.get(error.errno or 0, str(error.errno))}


def _measure(fd: int) -> str:
    buffer = bytearray(struct.pack("=HH", 0, 64) + bytes(64))
    fcntl.ioctl(fd, _MEASURE, buffer)
    algorithm, size = struct.unpack_from("=HH", buffer)
    return f"{ {1: 'sha256', 2: 'sha512'}[algorithm] }:{buffer[4 : 4 + size].hex()}"


def _signature(fd: int) -> str:
    buffer = ctypes.create_string_buffer(16384)
    argument = struct.pack("=QQQQQ", 3, 0, 16384, ctypes.addressof(buffer), 0)
    return hashlib.sha256(buffer.raw[: fcntl.ioctl(fd, _READ_METADATA, bytearray(argument))]).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
