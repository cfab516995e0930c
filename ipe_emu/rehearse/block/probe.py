"""What blkid(8) finds on a disk or partition: the names by which udev makes links to it."""

import os
import shutil
import subprocess
from typing import Final

from attrs import frozen

#: sbin is not on everybody's PATH.
_PLACES: Final = os.defpath + ":/usr/sbin:/sbin"
_LONGEST: Final = 30


@frozen
class Probed:
    """A superblock's type, uuid and label, as blkid writes them into udev's database (``…_ENC``); empty for none."""

    kind: str = ""
    uuid: str = ""
    label: str = ""


def probe(image: str, offset: int, size: int) -> Probed:
    """Have blkid look at a part of an image file, without its cache and without privileges.

    Where there is no blkid, or it finds nothing or more than one thing, nothing is known.
    """
    program = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:{_PLACES}")
    if program is None:
        return Probed()
    try:
        done = subprocess.run(
            [program, "--probe", "--output", "udev", "--offset", str(offset), "--size", str(size), "--", image],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return Probed()
    if done.returncode:
        return Probed()
    found = dict(line.partition("=")[::2] for line in os.fsdecode(done.stdout).splitlines())
    uuid = found.get("ID_FS_UUID_ENC", "")
    return Probed(found.get("ID_FS_TYPE", ""), uuid, found.get("ID_FS_LABEL_ENC", ""))
