"""What the kernel asks of the mount. The only place where an error of the model becomes a FUSEError.

Every errno that looks odd here is securityfs's own answer; the function that gives it is named beside it.
"""

# ruff: noqa: ARG002, D102 - names, order and meaning of these arguments are pyfuse3's

import errno
import functools
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from mmap import PAGESIZE
from typing import Final, TypeVar, TypeVarTuple

import pyfuse3
import trio
from attrs import define, field, frozen
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from ipe_emu.errors import KernelError
from ipe_emu.event import Subject
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import procfs
from ipe_emu.linux.mountinfo import OF_THIS_MACHINE, Superblocks
from ipe_emu.lsm import Ipe, Opener, Writer
from ipe_securityfs import node_directory
from ipe_securityfs.beside import OpenFiles
from ipe_securityfs.clients import (
    WITHOUT_CAPABILITY,
    Credentials,
    Running,
    Segment,
    Target,
    WaitingWrite,
    executable_of,
    find_write,
    reads_at_position,
    same_call,
    subject_of,
    waits_in_plain_write,
)
from ipe_securityfs.policy_file import PolicyFileReader
from ipe_securityfs.position import FilePosition
from ipe_securityfs.subtrees import DiskFile, ImageFile, NodeDirectory, TextFile
from ipe_securityfs.tree import NAME_MAX, Directory, File, Node, Owner, SymbolicLink, Tree

Arguments = TypeVarTuple("Arguments")
Value = TypeVar("Value")

log = logging.getLogger("ipe_emu.securityfs")

#: How long a write may take to show who makes it: the thread may not have gone to sleep yet when its request is here.
_SECONDS_TO_SEE_WRITER: Final = 2.0
_SECONDS_BETWEEN_LOOKS: Final = 0.0005
_LONGEST_PAUSE: Final = 0.1
#: How long a removal may take to go through the mount; a client that is stopped inside it must not hold up another.
_SECONDS_TO_REMOVE: Final = 2.0
#: How long a close(2) that has returned may take to be heard of.
_SECONDS_TO_CLOSE: Final = 0.2
#: How long the opener alone is looked at, if it was running: nearly always it writes itself.
_SECONDS_TO_SEE_OPENER: Final = 0.02
_PAGE: Final = 4096
#: For what only a setattr changes, which the kernel sees itself.
_AS_LONG_AS_MOUNTED: Final = 1e6
_ONLY_HEADER: Final = re.compile(rb"\s*policy_name=\S+[ \t]+policy_version=\S+\s*")
_NOBODY: Final = Subject(0, b"?")


@frozen
class MountedAs:
    """What the mount must know of its surroundings.

    ``removable_at`` is the path under which this process itself sees the mount, and None where it does not;
    ``device`` gives the mount's st_dev, from which no policy file is read. ``pid_level`` says which pid namespace is
    the rehearsed machine's: 0 for this process's own, 1 for one directly below it. ``size_trick`` shows readers a size
    (see ``Operations._show_size``); there is no need of it where an exec hook answers sendfile(2) and its kin.
    ``superblocks`` are the rehearsed machine's. ``names_writers``: the model wants to know who writes to whatever node,
    which costs something with every write.
    """

    credentials: Credentials
    facts: FactsSource
    removable_at: str | None = None
    device: int | None = None
    pid_level: int = 0
    size_trick: bool = True
    superblocks: Superblocks = OF_THIS_MACHINE
    names_writers: bool = False


@define(eq=False)
class _Rest:
    """What is left of a write(2) that FUSE cut, whose whole data was judged with the first piece."""

    write: WaitingWrite
    offset: int
    remaining: int


@define(eq=False)
class _Handle:
    """One open file description: ``tid`` opened it, with the credentials ``opener``.

    ``shows_size`` is for those whose reader might still use sendfile(2), ``position`` for those that can both read and
    write. ``moved`` is how far writes have moved FUSE's position of one whose own position no write moves.
    """

    node: File
    tid: int
    opener: Opener
    position: FilePosition | None
    shows_size: bool = False
    rest: _Rest | None = None
    moved: int = 0


@define(eq=False)
class _OpenDirectory:
    node: Directory
    snapshot: list[tuple[bytes, Node]] = field(factory=list)


def _refused(number: int, reason: str, function: str = "") -> FUSEError:
    log.debug("%s: %s (%s)", errno.errorcode.get(number, number), reason, function)
    return FUSEError(number)


class Operations(pyfuse3.Operations):
    """The file system. Runs in the one thread of the trio loop; only the loading of policies goes elsewhere."""

    def __init__(self, ipe: Ipe, tree: Tree, mounted_as: MountedAs) -> None:
        super().__init__()
        self._ipe = ipe
        self._tree = tree
        self.mounted_as = mounted_as
        self._entries: dict[int, EntryAttributes] = {}
        self._handles: dict[int, _Handle] = {}
        self._beside = OpenFiles()
        self._directories: dict[int, _OpenDirectory] = {}
        self._last_handle = 0
        self._removing: dict[int, Directory] = {}
        self._kept = procfs.KeptRecords()
        self._last_writer: tuple[tuple[int, Opener, MountedAs], Writer] | None = None

    def close(self) -> None:
        """Let go of what was kept open, at the end of the session."""
        self._kept.close()

    # -- names and attributes --------------------------------------------------------------------------------------

    def _node(self, ino: int) -> Node:
        try:
            return self._tree.node(ino)
        except KeyError:
            raise FUSEError(errno.ENOENT) from None

    def _entry(self, node: Node) -> EntryAttributes:
        """Return a node's attributes, from one object per node: what changes without a setattr is set each time."""
        entry = self._entries.get(node.ino)
        if entry is None:
            entry = self._entries[node.ino] = _new_entry(node)
        entry.st_nlink = node.nlink
        if isinstance(node, File) and node.readers:
            entry.st_size = _readable_size(node)
        else:
            entry.st_size = node.disk.size if isinstance(node, DiskFile) else node.attributes.size
        return entry

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        parent = self._node(parent_inode)
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if not isinstance(parent, Directory):
            raise FUSEError(errno.ENOTDIR)
        removing = self._removing.get(ctx.pid)
        node: Node | None
        if removing is not None and removing.parent is parent and removing.name == name:
            node = removing
        else:
            node = None if parent.removed else parent.lookup(name)
        if node is None:
            raise FUSEError(errno.ENOENT)
        node.lookups += 1
        return self._entry(node)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._node(inode))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._tree.forget(inode, count)
            self._entries.pop(inode, None)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Keep what is set, as simple_setattr() does; truncation changes the size that stat shows, and nothing else."""
        node = self._node(inode)
        if isinstance(node, ImageFile | TextFile):
            raise _refused(errno.EROFS, "this is for reading", "")
        if isinstance(node, DiskFile) and fields.update_size:
            raise _refused(errno.EINVAL, "a block device has the size it has", "do_ftruncate")
        attributes = node.attributes
        if fields.update_mode:
            attributes.mode = stat.S_IFMT(attributes.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            attributes.uid = attr.st_uid
        if fields.update_gid:
            attributes.gid = attr.st_gid
        if fields.update_size:
            attributes.size = attr.st_size
        if fields.update_atime:
            attributes.atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            attributes.mtime_ns = attr.st_mtime_ns
        if fields.update_ctime:
            attributes.ctime_ns = attr.st_ctime_ns
        self._entries.clear()  # two names may share attributes
        return self._entry(node)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Answer as simple_statfs(): nothing has a size, names have at most 255 bytes."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = NAME_MAX
        return data

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        return []

    # -- what securityfs does not let anyone do --------------------------------------------------------------------

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        # vfs_create() without i_op->create; every other type lacks i_op->mknod.
        raise _refused(errno.EACCES if stat.S_ISREG(mode) else errno.EPERM, "nothing can be made here", "vfs_mknod")

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        raise _refused(errno.EACCES, "nothing can be made here", "lookup_open")

    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        raise _refused(errno.EPERM, "policies appear when they are loaded", "vfs_mkdir")

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._node(parent_inode)
        if not isinstance(parent, NodeDirectory):
            raise _refused(errno.EPERM, "nothing can be made here", "vfs_symlink")
        try:
            link = node_directory.symlink(self._tree, parent, name, target, Owner(ctx.uid, ctx.gid))
        except KernelError as error:
            raise _as_fuse(error, parent) from None
        link.lookups += 1
        return self._entry(link)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        node = self._node(inode)
        if not isinstance(node, SymbolicLink):
            raise FUSEError(errno.EINVAL)
        return FileNameT(node.target)

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        raise _refused(errno.EPERM, "nothing can be made here", "vfs_link")

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        parent = self._node(parent_inode_old)
        if not isinstance(parent, NodeDirectory) or parent_inode_new != parent_inode_old:
            raise _refused(errno.EPERM, "nothing can be renamed here", "vfs_rename")
        try:
            node_directory.rename(self._tree, parent, name_old, name_new, flags)
        except KernelError as error:
            raise _as_fuse(error, parent) from None

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        parent = self._node(parent_inode)
        if not isinstance(parent, NodeDirectory):
            raise _refused(errno.EPERM, "nodes go with their policy: write 1 to its delete node", "vfs_unlink")
        try:
            node_directory.unlink(self._tree, parent, name)
        except KernelError as error:
            raise _as_fuse(error, parent) from None

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        if self._removing.pop(ctx.pid, None) is None:
            raise _refused(errno.EPERM, "a policy goes when 1 is written to its delete node", "vfs_rmdir")

    # -- directories -----------------------------------------------------------------------------------------------

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        node = self._node(inode)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        handle = self._next_handle()
        self._directories[handle] = _OpenDirectory(node)
        return handle

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        directory = self._directories[fh]
        node = directory.node
        if node.removed:
            raise _refused(errno.ENOENT, "the directory was removed", "iterate_dir")
        if start_id == 0:
            directory.snapshot = [(b".", node), (b"..", node.parent or node), *node.listing()]
        for position, (name, child) in enumerate(directory.snapshot[start_id:], start_id + 1):
            if child.removed:
                continue
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._entry(child), position):
                return
            if name not in (b".", b".."):
                child.lookups += 1

    async def releasedir(self, fh: FileHandleT) -> None:
        del self._directories[fh]

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Do nothing, successfully (``noop_fsync()``)."""

    # -- files -----------------------------------------------------------------------------------------------------

    def _next_handle(self) -> FileHandleT:
        self._last_handle += 1
        return FileHandleT(self._last_handle)

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._node(inode)
        if not isinstance(node, File):
            return await self._open_beside(node, flags)
        if flags & os.O_DIRECT:
            raise _refused(errno.EINVAL, "O_DIRECT is unknown here", "do_dentry_open")
        if node.alias:
            self._ipe.note_alias_use()
        if node.exclusive:
            await _take(node, flags)
        if flags & os.O_TRUNC:
            node.attributes.size = 0
        access = flags & os.O_ACCMODE
        # A descriptor that cannot write needs no credentials: no handler of a read asks for any.
        reads = access == os.O_RDONLY
        opener = WITHOUT_CAPABILITY if reads else self.mounted_as.credentials.opener(ctx.pid)
        both = access == os.O_RDWR and node.read is not None and node.write is not None
        handle = _Handle(node, ctx.pid, opener, FilePosition() if both else None)
        if reads and self.mounted_as.size_trick:
            self._show_size(node)
            handle.shows_size = True
            node.readers += 1
        fh = self._next_handle()
        self._handles[fh] = handle
        return FileInfo(fh=fh, direct_io=True)

    async def _open_beside(self, node: Node, flags: FlagT) -> FileInfo:
        fh = self._next_handle()
        try:
            kept = await self._beside.open(fh, node, flags)
        except Exception as error:
            raise _as_fuse(error, node) from None
        return FileInfo(fh=fh, direct_io=not kept, keep_cache=kept)

    async def _read_beside(self, fh: FileHandleT, offset: int, size: int) -> bytes:
        try:
            return await self._beside.read(fh, offset, size)
        except Exception as error:
            raise _as_fuse(error, self._beside.node(fh)) from None

    async def _write_beside(self, fh: FileHandleT, offset: int, data: bytes) -> int:
        try:
            return await self._beside.write(fh, offset, data)
        except Exception as error:
            raise _as_fuse(error, self._beside.node(fh)) from None

    def _show_size(self, node: File) -> None:
        """Tell the kernel how long a node is that is being opened for reading.

        To sendfile(2) and splice(2) a FUSE file of size 0 is at its end, and they say so without asking; securityfs
        answers EINVAL, and every tool then reads. With a size they ask, here as anywhere. Only while nobody else
        has it open: then no page of it is locked by a read that waits for this very thread. What is stored is the
        true last byte: whoever opens the node at the same moment may see it before the open drops the page.

        A stat(2) then shows that size too (the kernel: 0), and so the fewest get it: descriptors for reading alone, as
        such tools open them, until they have read(2) to the end or are closed.
        """
        if node.readers:
            return
        content = _content(node)
        size = _PAGE if content is None else len(content)
        if not size:
            return
        try:
            pyfuse3.notify_store(InodeT(node.ino), size - 1, content[-1:] if content else b"\0")
        except OSError as error:
            log.debug("%s: size not shown: %s", node.path, error)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        handle = self._handles.get(fh)
        if handle is None:
            return await self._read_beside(fh, off, size)
        node = handle.node
        if node.read is None:
            _end_size(handle, off, size, _PAGE)
            raise _refused(errno.EINVAL, f"{node.path} cannot be read", "vfs_read")
        position = handle.position
        if position is not None and not await self._reads_at_position(handle):
            position = None
        try:
            content = node.read()
        except Exception as error:
            _end_size(handle, off, size, _PAGE)
            raise _as_fuse(error, node) from None
        start = off if position is None else position.of_read(off)
        data = content[start : start + size]
        if position is not None:
            position.has_read(len(data))
        if start + size >= len(content):
            _end_size(handle, off, size, len(content))
        return data

    async def _reads_at_position(self, handle: _Handle) -> bool:
        """Whether this is read(2), and not pread(2); it is if nobody in the opener's process is seen in a pread."""
        give_up = trio.current_time() + _SECONDS_TO_SEE_OPENER
        while True:
            running = False
            for tid in (handle.tid, *_threads_of(handle.tid)):
                try:
                    found = reads_at_position(tid, handle.node.ino)
                except Running:
                    running = True
                except OSError:
                    continue
                else:
                    if found is not None:
                        return found
            if not running or trio.current_time() > give_up:
                return True
            await trio.sleep(_SECONDS_BETWEEN_LOOKS)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        handle = self._handles.get(fh)
        if handle is None:
            return await self._write_beside(fh, off, buf)
        node = handle.node
        try:
            # Nearly every write is a boolean by its node's opener, and must be quick.
            if node.write is None or not self._is_plain(handle, len(buf)):
                return await self._write(handle, off, buf)
            writer = self._opener_as_writer(handle)
            if node.waits:
                await self._judge(node, buf, writer)
            else:
                node.write(buf, writer)
            return len(buf)
        except Exception as error:
            raise _as_fuse(error, handle.node) from None

    async def release(self, fh: FileHandleT) -> None:
        handle = self._handles.pop(fh, None)
        if handle is None:
            self._beside.release(fh)
            return
        if handle.shows_size:
            handle.node.readers -= 1
        if handle.node.exclusive:
            handle.node.taken = False

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        if self._beside.has(fh):
            return  # what is written to a disk is in its image, or forgotten at the end
        raise _refused(errno.EINVAL, "securityfs files have no fsync", "vfs_fsync_range")

    # -- writing ---------------------------------------------------------------------------------------------------

    def _is_plain(self, handle: _Handle, length: int) -> bool:
        """Whether the opener waits in a write(2) of a boolean, and of nothing else."""
        node = handle.node
        if node.takes_policy or node.names_file or handle.position is not None or handle.rest is not None:
            return False
        return waits_in_plain_write(handle.tid, node.ino, length, self._kept.record)

    async def _write(self, handle: _Handle, offset: int, data: bytes) -> int:
        node = handle.node
        if node.write is None:
            raise KernelError(errno.EINVAL, f"{node.path} cannot be written", "vfs_write")
        rest, handle.rest = handle.rest, None
        if rest is not None and rest.offset == offset and same_call(rest.write):
            taken = _take_from_rest(handle, rest, len(data))
            _move(handle, rest.write, offset + taken)
            return taken
        unsigned = node.takes_policy and self._ipe.profile.unsigned_policies and data[:1] != b"\x30"
        of_program = unsigned or node.names_file
        write = await self._who_writes(handle, data, compare=of_program)
        if of_program and write is not None:
            writer = self._program_in(handle, write)
        else:
            writer = self._writer_in(handle, handle.tid if write is None else write.tid)
        if write is not None and node.names_file:
            _check_position(handle, write, offset)
        if write is None or (write.count == len(data) and len(write.segments) == 1):
            taken = await self._judge(node, data, writer)
            _move(handle, write, offset + taken)
            return taken
        done = await self._write_segments(handle, data, write, writer)
        if done > len(data) and write.goes_on_after(len(data)):
            handle.rest = _Rest(write, offset + len(data), done - len(data))
        taken = min(done, len(data))
        _move(handle, write, offset + taken)
        return taken

    async def _who_writes(self, handle: _Handle, data: bytes, *, compare: bool) -> WaitingWrite | None:
        """Return the system call that waits for this write; None where its answer is EPERM whatever it is.

        KernelError EINVAL for sendfile(2) and its kin, EOPNOTSUPP for flags of pwritev2(2), EACCES if the call cannot
        be seen: what is not known to be one policy written by one write is not let in.
        """
        target = Target(handle.node.ino, self.mounted_as.device)
        write = await self._find_writer(target, handle.tid, data, compare=compare)
        if write is not None and write.from_file:
            raise KernelError(errno.EINVAL, f"{write.call.name} cannot write to securityfs", "do_splice")
        if write is not None and write.has_flags:
            raise KernelError(errno.EOPNOTSUPP, "securityfs knows no flags of pwritev2", "do_loop_readv_writev")
        if write is None:
            if not handle.opener.cap_mac_admin and not handle.node.names_file:
                return None
            error = KernelError(errno.EACCES, _why_not_seen(handle.tid), "")
            log.warning("%s: write refused: %s", handle.node.path, error.reason)
            if handle.node.takes_policy:
                self._ipe.refuse_load(error, self._writer_in(handle, handle.tid))
            raise error
        return write

    async def _find_writer(self, target: Target, opener: int, data: bytes, *, compare: bool) -> WaitingWrite | None:
        write, running = find_write((opener,), target, data, compare=compare)
        if write is not None:
            return write
        pause = _SECONDS_BETWEEN_LOOKS
        give_up = trio.current_time() + _SECONDS_TO_SEE_WRITER
        look_everywhere = trio.current_time() + (_SECONDS_TO_SEE_OPENER if running else 0)
        while trio.current_time() < give_up:
            write, running = find_write(_threads_of(opener), target, data, compare=compare)
            if write is None and trio.current_time() >= look_everywhere:
                write, running = await trio.to_thread.run_sync(
                    lambda: find_write(_threads_of_others(), target, data, compare=compare)
                )
                if write is None and not running:
                    return None
            if write is not None:
                return write
            await trio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return None

    async def _write_segments(self, handle: _Handle, data: bytes, write: WaitingWrite, writer: Writer) -> int:
        """Write each segment of a vector on its own (``do_loop_readv_writev()``), and all of a call that FUSE cut.

        The whole call is judged with its first piece, from the writer's memory, as the kernel copies it in whole.
        """
        cut = write.count != len(data)
        if cut and not await _from_writer(write.starts_with, data):
            raise KernelError(errno.EACCES, "the rest of a write that was cut, whose beginning was not seen", "")
        done = 0
        for number, segment in enumerate(write.segments):
            if segment.length == 0 and number:
                continue
            try:
                if cut:
                    content = await self._copied_in(handle, write, segment)
                else:
                    content = data[done : done + segment.length]
                taken = await self._judge(handle.node, content, writer)
            except KernelError:
                if done:
                    break
                raise
            if taken < len(content):
                return done + taken
            done += segment.length
        return done

    async def _copied_in(self, handle: _Handle, write: WaitingWrite, segment: Segment) -> bytes:
        """Return what the kernel copies of a segment; EFAULT where that is not all mapped, as from copy_from_user()."""
        node = handle.node
        wanted = min(segment.length, node.copied)
        try:
            return await _from_writer(procfs.copy_from_user, write.tid, segment.address, wanted)
        except KernelError as error:
            refused = error
            if not handle.opener.cap_mac_admin and not node.names_file:  # every handler of ours asks that first
                refused = KernelError(errno.EPERM, "the node was opened without CAP_MAC_ADMIN", node.path)
            if node.takes_policy:
                self._ipe.refuse_load(refused, self._writer_in(handle, write.tid))
            raise refused from None

    async def _judge(self, node: File, content: bytes, writer: Writer) -> int:
        """Put what was written to the model; return how much of it was taken."""
        assert node.write is not None  # noqa: S101 - asked in _write
        if not node.takes_policy:
            if node.waits:
                taken = await trio.to_thread.run_sync(node.write, content, writer)
            else:
                taken = node.write(content, writer)
            if node.removed and node.parent is not None:
                await self._remove_through_mount(node.parent)
            return taken
        if _ONLY_HEADER.fullmatch(content):
            log.warning(
                "%s: this write holds nothing but a policy's first line. One write(2) is one policy, and echo and"
                " printf of bash write line by line: use cat FILE > NODE, or dd bs=64k",
                node.path,
            )
        return await trio.to_thread.run_sync(node.write, content, writer)

    def _opener_as_writer(self, handle: _Handle) -> Writer:
        """Return the opener as the writer: the one of the last time if it was that, and nobody asks for names."""
        who = handle.tid, handle.opener, self.mounted_as
        if self._last_writer is None or self._last_writer[0] != who or self.mounted_as.names_writers:
            self._last_writer = who, self._writer_in(handle, handle.tid)
        return self._last_writer[1]

    def _writer_in(self, handle: _Handle, tid: int) -> Writer:
        """Return a writer, of whom it is known that ``tid`` is the thread that waits."""
        subject = _NOBODY
        if self.mounted_as.names_writers:
            with suppress(OSError, ValueError, LookupError):  # it is gone
                subject = subject_of(tid, self.mounted_as.pid_level)
        return Writer(handle.opener, subject, login=functools.partial(self.mounted_as.credentials.login, tid))

    def _program_in(self, handle: _Handle, write: WaitingWrite) -> Writer:
        """Return a writer of an unsigned policy or a path, of whom it matters which program it is."""
        try:
            subject = subject_of(write.tid, self.mounted_as.pid_level)
        except (OSError, ValueError, LookupError) as error:
            raise KernelError(errno.EACCES, f"which process writes cannot be established: {error}", "") from None
        facts, superblocks = self.mounted_as.facts, self.mounted_as.superblocks
        return Writer(
            handle.opener,
            subject,
            login=functools.partial(self.mounted_as.credentials.login, write.tid),
            executable=lambda: executable_of(write.tid, facts, superblocks),
            read_policy_file=PolicyFileReader(write.tid, subject.pid, facts, superblocks, self.mounted_as.device),
        )

    # -- removal ---------------------------------------------------------------------------------------------------

    async def _remove_through_mount(self, directory: Directory) -> None:
        """Have the kernel remove a deleted policy's directory, so that watchers of it and its parent hear of it.

        In every other way it is gone already. The rmdir(2) of a thread of this process comes back as a request.
        """
        with trio.move_on_after(_SECONDS_TO_REMOVE):
            await trio.to_thread.run_sync(self._remove_in_thread, directory, abandon_on_cancel=True)

    def _remove_in_thread(self, directory: Directory) -> None:
        name = directory.name
        assert directory.parent is not None  # noqa: S101 - policies/
        tid = threading.get_native_id()
        try:
            if self.mounted_as.removable_at is None:
                pyfuse3.invalidate_entry(InodeT(directory.parent.ino), FileNameT(name), InodeT(directory.ino))
            else:
                self._removing[tid] = directory
                os.rmdir(os.fsencode(self.mounted_as.removable_at) + b"/ipe/policies/" + name)  # noqa: PTH106 - bytes
        except OSError as error:
            log.debug("%s: removal not seen by watchers: %s", directory.path, error)
        finally:
            self._removing.pop(tid, None)


def _new_entry(node: Node) -> EntryAttributes:
    attributes = node.attributes
    entry = EntryAttributes()
    entry.st_ino = InodeT(node.ino)
    entry.entry_timeout = _AS_LONG_AS_MOUNTED if node.permanent else 0
    entry.attr_timeout = _AS_LONG_AS_MOUNTED if node.constant else 0
    entry.st_mode = ModeT(attributes.mode)
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


async def _from_writer(read: Callable[[*Arguments], Value], *arguments: *Arguments) -> Value:
    """Read from the memory of the writer in another thread.

    KernelError EFAULT if it is not all mapped, EACCES if it cannot be read for another reason.
    """
    try:
        return await trio.to_thread.run_sync(read, *arguments)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise KernelError(errno.EFAULT, "the data is not in the writer's memory", "copy_from_user") from None
        raise KernelError(errno.EACCES, f"the writer's memory cannot be read: {error}", "") from None


async def _take(node: File, flags: int) -> None:
    """Open a node that can be open once at a time, and for writing (``ima_open_policy()``)."""
    if not flags & os.O_WRONLY:
        raise _refused(errno.EACCES, "the policy cannot be read (CONFIG_IMA_READ_POLICY)", "ima_open_policy")
    # FUSE lets close(2) return before it tells of it.
    with trio.move_on_after(_SECONDS_TO_CLOSE):
        while node.taken:
            await trio.sleep(_SECONDS_BETWEEN_LOOKS)
    if node.taken:
        raise _refused(errno.EBUSY, "somebody has it open", "ima_open_policy")
    node.taken = True


def _check_position(handle: _Handle, write: WaitingWrite, offset: int) -> None:
    """Refuse a write that is not at the beginning; writes at the position move FUSE's and not the kernel's."""
    if offset != (handle.moved if write.moves_position else 0):
        raise KernelError(errno.EINVAL, "only a write at the beginning counts", "ima_write_policy")


def _take_from_rest(handle: _Handle, rest: _Rest, length: int) -> int:
    taken = min(length, rest.remaining)
    if rest.remaining > taken:
        handle.rest = _Rest(rest.write, rest.offset + taken, rest.remaining - taken)
    return taken


def _move(handle: _Handle, write: WaitingWrite | None, end: int) -> None:
    if write is None or not write.moves_position:
        return
    if handle.node.names_file:
        handle.moved = end
    if handle.position is not None:
        handle.position.has_written(end)


def _end_size(handle: _Handle, offset: int, size: int, shown: int) -> None:
    """Show the size no longer if it was read(2) that came to the end: nothing is left to be spliced then.

    The request is ``size`` bytes at ``offset``, of a node whose size shows as ``shown``. What splices fills whole pages
    of the page cache, and none beyond the end (``filemap_get_pages()``): any other request is that of a read(2).
    """
    if not handle.shows_size:
        return
    in_pages = not (size % PAGESIZE or offset % PAGESIZE) and offset + size <= shown + PAGESIZE - 1
    if in_pages and not _is_read(handle):
        return
    handle.shows_size = False
    handle.node.readers -= 1


def _is_read(handle: _Handle) -> bool:
    """Whether the opener is seen in a read(2) of the node, or one of its kin."""
    try:
        return reads_at_position(handle.tid, handle.node.ino) is not None
    except (OSError, Running):
        return False


def _content(node: File) -> bytes | None:
    """What reading the node gives; None where that is an error."""
    try:
        return node.read() if node.read is not None else None
    except Exception:  # whatever it is, the read that follows answers it
        return None


def _readable_size(node: File) -> int:
    """The length of what reading gives; a page where it gives an error, so that somebody asks and gets it.

    (Of a size that is no whole number of pages, ``wc -c`` would believe that it is the answer.)
    """
    content = _content(node)
    return _PAGE if content is None else len(content)


def _threads_of(pid: int) -> list[int]:
    try:
        return procfs.threads(pid)
    except OSError:
        return []


def _threads_of_others() -> Iterator[int]:
    own = set(procfs.threads(os.getpid()))
    return (tid for tid in procfs.all_threads() if tid not in own)


def _why_not_seen(tid: int) -> str:
    try:
        procfs.current_syscall(tid)
    except PermissionError:
        return (
            f"the system call of the writer (thread {tid}) cannot be read, so that one write cannot be told from"
            " a part of one. Where kernel.yama.ptrace_scope is not 0, only root may: mount as root, or use"
            " `ipe-emu run`"
        )
    except OSError:
        pass
    return (
        "no process is seen that waits in a write of this data: neither the one that opened the node nor another."
        " io_uring, asynchronous and 32-bit writers cannot be judged"
    )


def _as_fuse(error: Exception, node: Node) -> FUSEError:
    """Answer with the model's errno; with EIO where it failed, for the mount must outlive what was written to it."""
    if isinstance(error, KernelError):
        log.info("%s: %s", node.path, error)
        return FUSEError(error.errno)
    log.error("%s: this is a defect of ipe-emu", node.path, exc_info=error)
    return FUSEError(errno.EIO)
