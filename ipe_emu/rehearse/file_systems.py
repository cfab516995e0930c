"""mount(2) of file systems on block devices: read-only, by programs of user space (`ipe_emu.volumes`).

A device has one superblock, however often it is mounted (``get_tree_bdev()``). It is kept as long as the machine lives,
so that its device number, by which facts are known, is never another one's.
"""

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import define, field, frozen

from ipe_emu.errors import KernelError, NotJudgedError, UserError
from ipe_emu.integrity.facts import Facts
from ipe_emu.linux import mounts, procfs
from ipe_emu.linux.mountinfo import Superblocks
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.rehearse.block.content import Content
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.mounting import Found, MountRequest
from ipe_emu.rehearse.requests import Agent
from ipe_emu.volumes import programs
from ipe_emu.volumes.recognise import Kind, check_mountable, recognise

if TYPE_CHECKING:
    from ipe_emu.volumes.ext4_seals import ImageSeals, SealedFiles
    from ipe_securityfs.subtrees import Subtrees

_PIECE: Final = 1 << 20
#: Options that change nothing of what is read.
_HARMLESS: Final = frozenset({
    b"", b"ro", b"noload", b"norecovery", b"errors=continue", b"errors=remount-ro", b"errors=panic", b"threads=single",
    b"data=ordered", b"barrier=1", b"nobarrier", b"user_xattr", b"acl", b"discard", b"nodiscard",
})  # fmt: skip
#: Types, as mount(2) and /proc/filesystems have them.
KINDS: Final = {kind.value: kind for kind in Kind}


@define(eq=False)
class _Superblock:
    """A file system on a device, mounted in the staging directory at ``path``.

    ``content`` is what the device had then: with another table it has another one, of which nothing was read here.
    """

    device: BlockDevice
    content: Content | None
    kind: Kind
    path: Path
    number: str
    #: Whether it is mounted for reading alone (SB_RDONLY), as those are that cannot be written.
    read_only: bool
    #: After how many writes of the machine to its disks it was made.
    writes: int
    #: Whether its device is claimed for it: it is mounted somewhere in the machine, as far as is known.
    claimed: bool = True
    #: Whether its mount in the machine is still to come.
    being_mounted: bool = True
    #: The files that fs-verity has sealed in it, and after how many writes they were looked at.
    seals: "SealedFiles | None" = None
    sealed_at: int = 0


@frozen(eq=False)
class _Watched:
    """A device's content for a program that hides what it cannot read: ``unreadable`` is told before it is."""

    device: BlockDevice
    unreadable: Callable[[BlockDevice, Exception], None]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.device.size

    def read(self, offset: int, length: int) -> bytes:
        """Read from the device, whatever is the matter with it."""
        try:
            return self.device.read(offset, length)
        except Exception as error:
            self.unreadable(self.device, error)
            raise


@define(eq=False)
class BlockFileSystems:
    """Mounts what is on block devices (`mounting.MountEmulator`). ``serve`` must have been called before."""

    devices: BlockDevices
    agent: Agent
    superblocks: Superblocks
    facts: dict[str, Facts]
    pid_depth: int
    _subtrees: "Subtrees" = field(init=False, repr=False)
    _root: int = field(default=-1, init=False)
    #: Learns what is sealed on them.
    seals: "ImageSeals | None" = field(default=None, init=False)
    #: Told what cannot be judged; from any thread.
    not_judged: Callable[[None, str, str], None] = field(default=lambda *_: None, init=False)
    #: The thread that answers system calls.
    _answering: int = field(default=0, init=False)
    _known: list[_Superblock] = field(factory=list, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)
    _names: Iterator[int] = field(factory=itertools.count, init=False, repr=False)

    def serve(self, subtrees: "Subtrees", root: int) -> None:
        """Tell through which session images are read; ``root`` is a descriptor of its root directory."""
        self._subtrees, self._root = subtrees, root

    def mount(self, request: MountRequest) -> Found:
        """Return the file system on a device. KernelError as ``get_tree_bdev()`` and the file system's own mount.

        NotJudgedError for options that could matter, and images that the programs cannot be trusted with.
        """
        device = self._device(request)
        if unknown := [word for word in request.data.split(b",") if word not in _HARMLESS]:
            raise NotJudgedError(f"the mount option {os.fsdecode(unknown[0])!r} of {request.kind}")
        writable = not request.flags & Attribute.RDONLY
        if writable and device.read_only:
            raise KernelError(errno.EACCES, f"{device.name} is read-only", "bdev_file_open_by_path")
        self._answering = threading.get_ident()
        self.look_after()
        found = next((known for known in self._known if known.device is device and known.claimed), None)
        if found is None:
            read_only = not writable or KINDS[request.kind] is not Kind.EXT4
            found = self._superblock(device, KINDS[request.kind], os.fsdecode(request.source), read_only=read_only)
        elif found.kind is not KINDS[request.kind]:
            raise KernelError(errno.EBUSY, f"{device.name} is mounted as {found.kind.value}", "bd_may_claim")
        elif found.read_only is writable:
            how = "reading" if found.read_only else "writing"
            raise KernelError(errno.EBUSY, f"{device.name} is mounted for {how}", "get_tree_bdev")
        found.being_mounted = True
        note = "" if found.read_only else "read-only here"
        return Found(found.path, Attribute.NONE, note)

    def take_facts(self) -> None:
        """Look whether a mounted file system's device got another table; NotJudgedError if one did.

        A kernel would read on from the new one, and judge what it has cached by the new root hash.
        """
        for known in self._known:
            if known.claimed and known.device.content is not known.content:
                raise NotJudgedError(f"{known.device.name} got another table while its {known.kind.value} was mounted")

    def _unreadable(self, device: BlockDevice, error: Exception) -> None:
        reason = f"what reads a file system here does not pass on that {device.name} cannot be read: {error}"
        self.not_judged(None, "read", reason)

    def recheck(self, number: str, seals: "SealedFiles") -> None:
        """Look whether the files that were sealed on a file system are so still, if the machine wrote to its disks.

        NotJudgedError if not: a kernel would give what it has read before, or EIO.
        """
        known = next(known for known in self._known if known.number == number)
        writes = self.devices.writes
        if known.sealed_at == writes or not seals.by_inode:
            return
        if _sealed_files(known.device).by_inode != seals.by_inode:
            raise NotJudgedError(f"sealed files on {known.device.name} were overwritten while it was mounted")
        known.sealed_at = writes

    def finish(self) -> None:
        """Hear that the machine has ended: look whether a kernel could have read what erofs was copied from."""
        for known in self._known:
            if known.kind is not Kind.EROFS or known.writes == self.devices.writes or known.content is None:
                continue
            if not self.facts[known.number].dmverity_roothash:
                continue
            try:
                _read_all(known.content)
            except KernelError as error:
                reason = f"{known.device.name} was corrupted while its erofs was mounted: {error.reason}"
                self.not_judged(None, "read", reason)

    def look_after(self) -> None:
        """Give devices back whose file systems nobody in the machine has mounted any more."""
        with self._lock:
            if threading.get_ident() == self._answering:  # who looks here has mounted what it was to mount
                for known in self._known:
                    known.being_mounted = False
            claimed = [known for known in self._known if known.claimed and not known.being_mounted]
            mounted = _mounted(self.pid_depth) if claimed else set()
            for known in claimed:
                if known.number not in mounted:
                    known.claimed = False
                    self.devices.release(known.device, known)

    def _device(self, request: MountRequest) -> BlockDevice:
        """Return the device that the source names to the caller (``lookup_bdev()``)."""
        if not request.source:
            raise KernelError(errno.EINVAL, "no source", "lookup_bdev")
        st = os.fstat(request.caller.look_up(AT_FDCWD, request.source))
        shown = os.fsdecode(request.source)
        if not stat.S_ISBLK(st.st_mode):
            raise KernelError(errno.ENOTBLK, f"{shown} is no block device", "lookup_bdev")
        device = self.devices.find(st.st_rdev)
        if device is None:
            raise KernelError(errno.ENXIO, f"{shown}: no device has this number", "blkdev_get_no_open")
        return device

    def _superblock(self, device: BlockDevice, kind: Kind, source: str, *, read_only: bool) -> _Superblock:
        """Mount what is on a device in the staging directory; or find what was mounted of it before."""
        same = (known for known in self._known if known.device is device and known.content is device.content)
        earlier = next((known for known in same if known.kind is kind), None)
        # Only with the same table, and that of a verity device, it is certain that nothing has changed since; unless
        # somebody wrote to what is below it. That a kernel does not read, or reads, if corruption is ignored.
        if earlier is not None and device.facts.dmverity_roothash and earlier.writes == self.devices.writes:
            self.devices.claim(device, earlier)
            earlier.claimed = True
            return earlier
        new = _Superblock(device, device.content, kind, Path(), "", read_only, self.devices.writes)
        self.devices.claim(device, new)  # before anybody looks what is on it
        try:
            self._check(device, kind)
            if kind is Kind.EXT4:
                new.sealed_at = self.devices.writes
                new.seals = _sealed_files(device)
            number = next(self._names)
            content = _Watched(device, self._unreadable) if kind in programs.HIDES_ERRORS else device
            image = self._subtrees.add_image(b"file-system-%d" % number, content)
            fd = os.open(b"images/" + image.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root)
            try:
                new.path, st_dev, root = self.agent.mount_image(number, kind, programs.needed(kind), fd, source)
            finally:
                os.close(fd)
            if new.seals is not None:
                new.seals.check_numbers(root)
            if not read_only:
                # A kernel writes to it at once: whoever makes it a verity device afterwards finds it changed.
                from ipe_emu.volumes.ext4 import set_up_superblock  # noqa: PLC0415 - most boots have no such disk

                set_up_superblock(device.read, device.write)
                self.devices.writes += 1
        except BaseException:
            self.devices.release(device, new)
            raise
        new.number = f"{os.major(st_dev)}:{os.minor(st_dev)}"
        self.superblocks.names[new.number] = device.name
        self.facts[new.number] = device.facts
        if new.seals is not None and self.seals is not None:
            self.seals.by_device[new.number] = new.seals
            if not read_only:
                self.seals.for_writing.add(new.number)
        self._known.append(new)
        return new

    def _check(self, device: BlockDevice, kind: Kind) -> None:
        """Refuse what a kernel refuses, and what the program for it would read otherwise than a kernel does."""
        try:
            if recognise(device.read, device.size) is not kind:
                raise KernelError(errno.EINVAL, f"no {kind.value} on {device.name}", "get_tree_bdev")
            check_mountable(kind, device.read, device.size, device.block_size)
        except UserError as error:
            raise KernelError(errno.EINVAL, f"{device.name} {error}", "get_tree_bdev") from None
        if kind in programs.HIDES_ERRORS and device.facts.dmverity_roothash is not None:
            try:
                _read_all(device)
            except KernelError as error:
                raise NotJudgedError(
                    f"{device.name} is corrupted, and what reads {kind.value} here would not say where: {error.reason}"
                ) from None


def _read_all(content: BlockDevice | Content) -> None:
    """Read a device from end to end; KernelError where that fails."""
    for offset in range(0, content.size, _PIECE):
        content.read(offset, _PIECE)


def _sealed_files(device: BlockDevice) -> "SealedFiles":
    """Find what is sealed on a device with ext4. NotJudgedError for a file that a kernel could not open, or read."""
    from ipe_emu.volumes.ext4_seals import SealedFiles  # noqa: PLC0415 - most boots have no such disk

    try:
        seals = SealedFiles.find(device.read, device.size)
        seals.check()
    except KernelError as error:
        raise NotJudgedError(
            f"a file on {device.name} cannot be used on a kernel, and what mounts ext4 here would let it be: {error}"
        ) from None
    return seals


def _mounted(pid_depth: int) -> set[str]:
    """Return the device numbers of all file systems that a process of the machine has mounted somewhere."""
    found: set[str] = set()
    seen: set[int] = set()
    for pid in procfs.processes():
        try:
            if len(procfs.process_ids(pid)) <= pid_depth:
                continue
            namespace = procfs.namespace(pid, "mnt")
            if namespace not in seen:
                found |= {f"{os.major(m.device)}:{os.minor(m.device)}" for m in mounts.mounts(pid)}
                seen.add(namespace)
        except (OSError, ValueError):
            continue  # it ended
    return found
