"""A pyfuse3 file system with one file, ``ipe/enforce``, that does nothing: what `bench` compares the emulator with."""

import errno
import os
import stat
import sys

import pyfuse3
import trio

DIRECTORY = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
FILE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 2)
A_DAY = 86400  # seconds; longer than any mount that is measured
NAMES = {(pyfuse3.ROOT_INODE, b"ipe"): DIRECTORY, (DIRECTORY, b"enforce"): FILE}


class Nothing(pyfuse3.Operations):
    """As little as a file that can be read and written takes, mounted as the emulator is.

    That is with direct_io, and with names and directories that the kernel may keep, for they do not change.
    """

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Attributes of a directory or of the file."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o644 if inode == FILE else stat.S_IFDIR | 0o755
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = A_DAY
        entry.attr_timeout = 0 if inode == FILE else A_DAY
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the directory, and the file in it."""
        found = NAMES.get((parent_inode, name))
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(found)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open it."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Always the same octet."""
        return b"1"[off:]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Take everything."""
        return len(buf)


def main() -> None:
    """Serve until unmounted."""
    pyfuse3.init(Nothing(), sys.argv[1], {"default_permissions", "fsname=nothing"})
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
