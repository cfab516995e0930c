"""The file behind a memory mapping of a caller (kernel: ``vma->vm_file``)."""

import functools
import os
from collections.abc import Iterator
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.linux.overlayfs import NAME as OVERLAY
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.linux.tracee import Mapping

# Shared anonymous memory is a file of the kernel's own tmpfs; a name given to it by prctl(2) hides the file's.
_NAMED_SHARED_MEMORY: Final = b"[anon_shmem:"
_SHARED_MEMORY_PATH: Final = b"/dev/zero (deleted)"


def file_of(caller: Caller, mapping: Mapping) -> File | None:
    """Return the file of a mapping, None for anonymous memory.

    NotJudgedError where it cannot be found again: a file that was deleted or replaced since, for a supervisor without
    authority over the whole machine.
    """
    if not mapping.dev and not mapping.ino:
        return None
    try:
        fd = caller.mapping(mapping)
    except PermissionError:
        return _found_by_name(caller, mapping)
    return caller.mapped_file(fd)


def _found_by_name(caller: Caller, mapping: Mapping) -> File:
    path = _SHARED_MEMORY_PATH if mapping.path.startswith(_NAMED_SHARED_MEMORY) else mapping.path
    if mapping.dev == _kernel_tmpfs():
        return File(path, "tmpfs", mapping.ino)
    name = caller.below_root(path)
    try:
        fd = caller.look_up(AT_FDCWD, name, follow=False)
    except KernelError:
        fd = None
    if fd is not None and (mapping.dev, mapping.ino) in _identities(caller, fd):
        return caller.mapped_file(fd)
    raise NotJudgedError(f"the mapped file {os.fsdecode(name)!r} is no longer found under its name")


def _identities(caller: Caller, fd: int) -> Iterator[tuple[int, int]]:
    """The numbers of device and inode by which /proc/PID/maps may show a file."""
    st = os.fstat(fd)
    yield st.st_dev, st.st_ino
    mount, location = caller.locate(fd)
    if mount.superblock == OVERLAY and location is not None:  # stat(2) gives another device number of it
        major, _, minor = location.device.partition(":")
        yield os.makedev(int(major), int(minor)), st.st_ino
        real = caller.real(fd)  # shown before Linux 6.7
        if real is not None:
            yield real.status.st_dev, real.status.st_ino


@functools.cache
def _kernel_tmpfs() -> int:
    """Return the device number of the tmpfs that holds memfds and shared memory, of which nothing is ever known."""
    fd = os.memfd_create("ipe-emu")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
