"""Mounts whose emulator is gone: telling them from living ones, and taking them away."""

import errno
import os
import subprocess
import time
from typing import Final

from ipe_emu.errors import UserError
from ipe_emu.linux import mounts, syscalls

#: What /proc/mounts shows as the type of ours.
FILE_SYSTEM: Final = b"fuse.securityfs"
#: How long libfuse's helper may take to notice that the process it watches is gone (it looks twice a second).
_SECONDS_FOR_HELPER: Final = 3.0
_SECONDS_BETWEEN_LOOKS: Final = 0.02
_MNT_DETACH: Final = 2


def mount_on(directory: str) -> mounts.MountInfo | None:
    """Return what is mounted on a directory, without asking that file system anything."""
    try:
        return mounts.mount_at(os.fsencode(directory))
    except FileNotFoundError:
        return None


def is_dead(directory: str) -> bool:
    """Whether a mount of ours lies there that nobody serves. The caller knows that no living emulator owns it."""
    found = mount_on(directory)
    if found is None or found.kind != FILE_SYSTEM:
        return False
    try:
        os.stat(directory)  # noqa: PTH116
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def detach_dead(directory: str) -> bool:
    """Take away a dead mount of ours; False if there is none. UserError if that is not permitted.

    libfuse's helper does that as well (auto_unmount), and takes whatever is mounted there when it comes to it: so it
    is waited for first, or it would take the next mount.
    """
    if not is_dead(directory):
        return False
    give_up = time.monotonic() + _SECONDS_FOR_HELPER
    while time.monotonic() < give_up:
        if not is_dead(directory):
            return True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if os.geteuid() == 0:
        syscalls.call("umount2", os.fsencode(directory), _MNT_DETACH)
    else:
        done = subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True, check=False, timeout=30)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()
            raise UserError(f"{directory}: a mount whose emulator is gone cannot be taken away: {reason}")
    return True
