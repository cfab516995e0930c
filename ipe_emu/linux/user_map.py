"""Ids of one user namespace in another (user_namespaces(7), "User and group ID mappings")."""

from typing import Final

from ipe_emu.linux import procfs

#: What stands for an id without a mapping (overflowuid, overflowgid).
_OVERFLOW: Final = 65534


def is_mapped(pid: int, which: str, number: int) -> bool:
    """Whether an id of the user namespace of ``pid`` is any of this process's; ``which`` is uid_map or gid_map."""
    return any(
        first <= number < first + count
        for first, _, count in (map(int, line.split()) for line in procfs.read(pid, which).splitlines())
    )


def inside(pid: int, which: str, number: int) -> int:
    """Return an id of this process's user namespace as it is in that of ``pid``; ``which`` is uid_map or gid_map.

    The lines of a map that somebody else reads give the outer ids as the reader has them.
    """
    for line in procfs.read(pid, which).splitlines():
        first, outer, count = map(int, line.split())
        if outer <= number < outer + count:
            return first + number - outer
    return _OVERFLOW
