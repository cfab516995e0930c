"""Mounts whose emulator is gone: telling them from living ones, and taking them away."""

import errno
import os
import subprocess
import time
from typing import Final

from ipe_emu.errors import UserError
from ipe_emu.linux import mounts, procfs, syscalls

#: What /proc/mounts shows as the type of ours.
FILE_SYSTEM: Final = b"fuse.securityfs"
#: How long libfuse's helper may take to see that the process it watches is gone, and to end.
_SECONDS_FOR_HELPER: Final = 3.0
#: How long the mount of an emulator that has ended may stay.
_SECONDS_TO_GO: Final = 10.0
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
    return not _answers(directory)


def _answers(directory: str) -> bool:
    try:
        os.statvfs(directory)  # always asks; attributes the kernel has may outlive the emulator
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def wait_for_helper(directory: str) -> None:
    """Wait until libfuse's helper of an earlier mount on the directory has ended (auto_unmount).

    It takes away what is mounted there when it comes to it, which would otherwise be the next mount.
    """
    give_up = time.monotonic() + _SECONDS_FOR_HELPER
    while _has_helper(directory) and time.monotonic() < give_up:
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def wait_until_gone(directory: str) -> None:
    """Return when the mount of an emulator that has ended is gone; UserError if it cannot be taken away.

    The emulator unmounts it, or libfuse's helper does: by fusermount3, both, which fails where the table of mounts
    changes while it looks.
    """
    wait_for_helper(directory)
    give_up = time.monotonic() + _SECONDS_TO_GO
    while not _answers(directory):
        try:
            detach_dead(directory)
        except UserError:
            if time.monotonic() > give_up:
                raise
        if time.monotonic() > give_up:
            raise UserError(f"{directory}: the mount is still there, and its emulator is not")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _has_helper(directory: str) -> bool:
    wanted = os.fsencode(directory)
    for name in os.listdir("/proc"):  # noqa: PTH208 - names alone, without a Path for each
        if name.isdigit():
            try:
                words = procfs.read(name, "cmdline").split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"fusermount3") and wanted in words:
                return True
    return False


def detach_dead(directory: str) -> bool:
    """Take away a dead mount of ours; False if there is none. UserError if that is not permitted.

    libfuse's helper does so too, but gives up when the table of mounts changes while it looks.
    """
    if not is_dead(directory):
        return False
    wait_for_helper(directory)
    if not is_dead(directory):
        return True
    if os.geteuid() == 0:
        syscalls.call("umount2", os.fsencode(directory), _MNT_DETACH)
    else:
        done = subprocess.run(["fusermount3", "-u", "-z", directory], capture_output=True, check=False, timeout=30)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()
            raise UserError(f"{directory}: a mount whose emulator is gone cannot be taken away: {reason}")
    return True
