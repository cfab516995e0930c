"""A directory as an image: packed as ``cpio -o -H newc`` would, so that it is unpacked as any other."""

import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, Final

from attrs import define, field

from ipe_emu.errors import UserError
from ipe_emu.rehearse.image.cpio import TRAILER, Entry, pack_header

_CHUNK: Final = 256 << 10
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def pack_directory(fd: int, file: BinaryIO) -> None:
    """Write an archive of the directory that ``fd`` is open on to ``file``: sorted, a directory before what is in it.

    What belongs to the caller belongs to root in it, unless he is root himself, for a plain user could not build it
    otherwise. UserError where something cannot be read, or cpio cannot hold it.
    """
    _Packing(fd, file).run()


@define(eq=False)
class _Packing:
    directory: int
    file: BinaryIO
    _numbers: dict[tuple[int, int], int] = field(factory=dict)

    def run(self) -> None:
        self._add(b".", os.fstat(self.directory))
        walk = os.fwalk(b".", dir_fd=self.directory, follow_symlinks=False, onerror=_refuse)
        for path, directories, files, at in walk:
            directories.sort()
            for name in sorted(files + directories):
                full = os.path.join(path, name).removeprefix(b"./")  # noqa: PTH118 - bytes of any kind
                try:
                    found = os.stat(name, dir_fd=at, follow_symlinks=False)
                    target = os.readlink(name, dir_fd=at) if stat.S_ISLNK(found.st_mode) else None
                    self._add(full, found, target)
                    if stat.S_ISREG(found.st_mode):
                        self._add_data(at, name, found.st_size)
                except (OSError, ValueError) as error:
                    raise UserError(f"{os.fsdecode(full)!r} in the directory cannot be packed: {error}") from error
        self.file.write(pack_header(Entry(TRAILER, 0)))
        self.file.flush()

    def _add(self, name: bytes, found: os.stat_result, target: bytes | None = None) -> None:
        self.file.write(pack_header(self._entry(name, found, target)))

    def _add_data(self, at: int, name: bytes, size: int) -> None:
        for piece in _content(at, name, size):
            self.file.write(piece)
        self.file.write(bytes(-size % 4))

    def _entry(self, name: bytes, found: os.stat_result, target: bytes | None) -> Entry:
        device = stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)
        return Entry(
            name,
            found.st_mode,
            uid=0 if found.st_uid == os.geteuid() else found.st_uid,
            gid=0 if found.st_gid == os.getegid() else found.st_gid,
            nlink=found.st_nlink,
            mtime=max(0, int(found.st_mtime)),
            size=found.st_size if stat.S_ISREG(found.st_mode) else 0,
            # Numbers of this machine may have 64 bits.
            ino=self._numbers.setdefault((found.st_dev, found.st_ino), len(self._numbers) + 1),
            rdev=(os.major(found.st_rdev), os.minor(found.st_rdev)) if device else (0, 0),
            target=target,
        )


def _content(at: int, name: bytes, size: int) -> Iterator[bytes]:
    """Yield exactly ``size`` bytes of a file. OSError if it cannot be read or is shorter by now."""
    fd = os.open(name, _READ, dir_fd=at)
    try:
        while size:
            piece = os.read(fd, min(_CHUNK, size))
            if not piece:
                raise OSError("it became shorter while it was read")
            size -= len(piece)
            yield piece
    finally:
        os.close(fd)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename!r} in the directory cannot be read: {error.strerror}") from error
