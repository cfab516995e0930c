"""Record what a kernel unpacks of random images, for tests/vectors: needs a User-Mode Linux and a static busybox.

    .venv/bin/python scripts/record_initramfs.py KERNEL-IMAGE FIRST-SEED COUNT >vectors.jsonl

Each image begins with busybox and an init that lists the rootfs; the random part comes behind it. A line is the random
part, the kernel's message if it stopped, and what was there. Images with which this kernel crashes are left out.
"""

import base64
import json
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.rehearse.image.making import DIRECTORY, TRAILER, member
from tests.rehearse.image.random_images import random_image

_INIT = rb"""#!/bin/busybox sh
b=/bin/busybox
$b mkdir /proc
$b mount -t proc proc /proc
$b dmesg | $b grep -i 'unpacking failed: '
$b umount /proc
$b rmdir /proc
echo LIST
$b find / -xdev | $b sort | while IFS= read -r f; do
    $b stat -c '%n|%f|%u|%g|%h|%Y|%t|%T' "$f"
    if [ -L "$f" ]; then echo "> $($b readlink "$f")"; elif [ -f "$f" ]; then echo "= $($b md5sum <"$f")"; fi
done
echo END
$b poweroff -f
"""
_OURS = {b"/bin", b"/bin/busybox", b"/init"}
#: Times that the archive does not give: of directories that changed later, of files that were cut.
_RECENT = 24 * 3600


def main() -> None:
    """Record."""
    kernel, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    busybox = Path("/bin/busybox").read_bytes()
    prefix = member(b"bin", DIRECTORY) + member(b"bin/busybox", stat.S_IFREG | 0o755, busybox)
    prefix += member(b"init", stat.S_IFREG | 0o755, _INIT) + TRAILER
    prefix += bytes(-len(prefix) % 512)
    for seed in range(first, first + count):
        image = random_image(seed, prefix)
        answer = boot(kernel, image)
        if answer is not None:
            print(json.dumps({"image": base64.b64encode(image[len(prefix) :]).decode(), **answer}), flush=True)


def boot(kernel: str, image: bytes) -> dict[str, Any] | None:
    """Return the message and the list of files, None if init did not come to its end."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        done = subprocess.run(
            [kernel, "mem=256M", f"initrd={file.name}", "con=null", "con0=fd:0,fd:1", "root=/dev/none", "panic=-1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False,
        )  # fmt: skip
    log, _, rest = done.stdout.replace(b"\r\n", b"\n").partition(b"LIST\n")
    listing, end, _ = rest.partition(b"\nEND\n")
    if not end:
        return None
    message = log.partition(b"unpacking failed: ")[2].partition(b"\n")[0].decode() or None
    files: dict[str, list[Any]] = {}
    last = ""
    for line in listing.split(b"\n"):
        if line.startswith((b"> ", b"= ")):
            files[last][-1] = line[2:].decode("latin-1").removesuffix("  -")
            continue
        name, mode, uid, gid, links, mtime, major, minor = line.split(b"|")
        last = name.decode("latin-1")
        is_directory = stat.S_ISDIR(int(mode, 16))
        known = abs(time.time() - int(mtime)) > _RECENT and name not in {b"/", b"/root", b"/dev", b"/dev/console"}
        files[last] = [
            int(mode, 16), int(uid), int(gid), 0 if is_directory else int(links), int(mtime) if known else None,
            [int(major, 16), int(minor, 16)], "",
        ]  # fmt: skip
    return {"message": message, "files": {name: v for name, v in files.items() if name.encode("latin-1") not in _OURS}}


if __name__ == "__main__":
    main()
