"""The programs that read file systems, and the packages of Debian and Ubuntu that have them."""

import os
import shutil
from typing import Final

from ipe_emu.errors import CannotEmulateError
from ipe_emu.volumes.recognise import Kind

PROGRAMS: Final = {Kind.SQUASHFS: "squashfuse_ll", Kind.EXT4: "fuse2fs", Kind.EROFS: "fsck.erofs"}
#: Those whose programs do not pass on that a block cannot be read: fsck.erofs reads all of it at once, fuse2fs gives
#: something else in its place. Such an image is verified as a whole before.
HIDES_ERRORS: Final = frozenset({Kind.EXT4, Kind.EROFS})
PACKAGES: Final = {"squashfuse_ll": "squashfuse", "fuse2fs": "fuse2fs", "fsck.erofs": "erofs-utils"}
# Not on everybody's PATH.
_MORE_DIRECTORIES: Final = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")


def find(kind: Kind) -> str | None:
    """Return the path of the program for a file system, or None if it is not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_MORE_DIRECTORIES])
    return shutil.which(PROGRAMS[kind], path=path)


def needed(kind: Kind) -> str:
    """Return the same, or raise CannotEmulateError with the remedy."""
    found = find(kind)
    if found is None:
        program = PROGRAMS[kind]
        raise CannotEmulateError(
            f"{program}, which reads {kind.value} images, is not installed: sudo apt-get install {PACKAGES[program]}"
        )
    return os.path.realpath(found)
