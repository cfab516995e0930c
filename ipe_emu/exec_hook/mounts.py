"""Which mount and which superblock a file lies on."""

import os
from typing import Final

from attrs import frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.linux import mountinfo, statx
from ipe_emu.linux.mountinfo import Location, Superblocks

# Files on mounts that the kernel keeps to itself, by how d_path() names them; the value is the superblock's s_id.
_KERNEL_MOUNTS: Final = (
    (b"/memfd:", "tmpfs"),
    (b"/dev/zero (deleted)", "tmpfs"),
    (b"/SYSV", "tmpfs"),
    (b"/anon_hugepage (deleted)", "hugetlbfs"),
    (b"/secretmem", "secretmem"),
    (b"/dmabuf:", "dmabuf"),
    (b"pipe:[", "pipefs"),
    (b"socket:[", "sockfs"),
    (b"anon_inode:", "anon_inodefs"),
)
# Files on hugetlbfs have blocks of a huge page, those of tmpfs never (2 MiB is the smallest of x86_64 and aarch64).
_HUGE_BLOCK: Final = 2 << 20

# Files whose location is kept; more than are executed again and again.
_MOST_LOCATIONS: Final = 4096


@frozen
class Mount:
    """A mount: ``id`` as in mountinfo, and its superblock's ``s_id``, as audit records name it in ``dev=``."""

    id: int
    superblock: str


class Mounts:
    """Mounts by the files on them. What was found is kept where the kernel gives mounts ids that are never reused."""

    def __init__(self, superblocks: Superblocks = mountinfo.OF_THIS_MACHINE) -> None:
        self._superblocks = superblocks
        self._known: dict[int, Mount] = {}
        self._locations: dict[tuple[int, int, bytes], Location | None] = {}

    def of(self, pid: int, fd: int) -> Mount:
        """Return the mount that descriptor ``fd`` of ours lies on, in the mount namespace of ``pid``.

        NotJudgedError for a mount that is in no namespace and is not one of the kernel's own either.
        """
        return self._of(pid, fd)[0]

    def locate(self, pid: int, fd: int, path: bytes, ino: int) -> tuple[Mount, Location | None]:
        """Return the same, and where the file lies on its file system; None on a mount that the kernel keeps to itself.

        ``path`` is how /proc/self/fd names it, ``ino`` its inode number. NotJudgedError for any other mount that nobody
        sees: such a file keeps the facts of its file system, and there is no telling which are its own.
        """
        mount, unique = self._of(pid, fd)
        if unique is None:
            return mount, self._location(pid, mount, fd, path)
        # The mount may move, and the file be renamed: then it has another path. Where both happen so that the path is
        # again the same, it is still the same file.
        key = (unique, ino, path)
        if key not in self._locations:
            if len(self._locations) >= _MOST_LOCATIONS:
                self._locations.clear()
            self._locations[key] = self._location(pid, mount, fd, path)
        return mount, self._locations[key]

    def _location(self, pid: int, mount: Mount, fd: int, path: bytes) -> Location | None:
        found = self._superblocks.location(pid, mount.id, path)
        if found is None:
            _kernel_mount(fd)
        return found

    def _of(self, pid: int, fd: int) -> tuple[Mount, int | None]:
        """Return a mount, and its id that is never reused."""
        unique = statx.unique_mount_id(fd)
        if unique is None:
            return self._look_up(pid, fd), None
        mount = self._known.get(unique)
        if mount is None:
            mount = self._known[unique] = self._look_up(pid, fd)
        return mount, unique

    def _look_up(self, pid: int, fd: int) -> Mount:
        mount_id = statx.mount_id(fd)
        superblock = self._superblocks.name_of(pid, mount_id, os.fstat(fd).st_dev) or _kernel_mount(fd)
        return Mount(mount_id, superblock)


def _kernel_mount(fd: int) -> str:
    path = os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - bytes: names need not be UTF-8
    for beginning, superblock in _KERNEL_MOUNTS:
        if path.startswith(beginning):
            return "hugetlbfs" if superblock == "tmpfs" and os.fstat(fd).st_blksize >= _HUGE_BLOCK else superblock
    raise NotJudgedError(f"{os.fsdecode(path)!r} lies on a mount that its process cannot name")
