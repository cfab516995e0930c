"""Namespaces, and the maps of a user namespace (user_namespaces(7))."""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from enum import IntFlag
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from ipe_emu.linux import syscalls

_Result = TypeVar("_Result")
_CLONE_FS: Final = 0x200


class Namespace(IntFlag):
    """The kinds of namespaces, as unshare(2) and setns(2) want them (CLONE_NEW…)."""

    MOUNT = 0x00020000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    USER = 0x10000000
    PID = 0x20000000
    NET = 0x40000000


def unshare(kinds: Namespace) -> None:
    """Leave the namespaces of these kinds for new ones. A new pid namespace is for children only."""
    syscalls.call("unshare", kinds)


def enter(fd: int, kind: Namespace) -> None:
    """Join the namespace that ``fd`` is open on (setns(2))."""
    syscalls.call("setns", fd, kind)


def in_mount_namespace_of(pid: int, act: Callable[[], _Result]) -> _Result:
    """Do something in the mount namespace of a process, at its root, in a thread that ends with it.

    The thread needs a root directory of its own, and this process has to be privileged over both user namespaces.
    OSError of ``act``, or if it may not go there.
    """
    done: list[_Result] = []
    failed: list[OSError] = []

    def run() -> None:
        try:
            syscalls.call("unshare", _CLONE_FS)
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                enter(namespace, Namespace.MOUNT)
            finally:
                os.close(namespace)
            done.append(act())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


class IdRange(NamedTuple):
    """One line of a map: ``size`` ids from ``inside`` up stand for those from ``outside`` up in the parent."""

    inside: int
    outside: int
    size: int


#: The map of the initial user namespace: every id stands for itself.
INITIAL_MAP: Final = (IdRange(0, 0, 0xFFFFFFFF),)


class IdMap(NamedTuple):
    """Both maps of a user namespace. ``setgroups`` says whether setgroups(2) is to work inside."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]
    setgroups: bool

    def describe(self) -> str:
        """Return the map in words."""
        uids = ", ".join(f"{r.inside} is {r.outside}" + (f" (and {r.size - 1} more)" * (r.size > 1)) for r in self.uids)
        return f"user ids: {uids}"


def read_map(pid: int | str, kind: str) -> tuple[IdRange, ...]:
    """Return the uid or gid map (``kind``) of a process's user namespace, as seen from the caller's."""
    lines = Path(f"/proc/{pid}/{kind}_map").read_text().splitlines()
    return tuple(IdRange(*map(int, line.split())) for line in lines)


def is_initial() -> bool:
    """Whether this process lives in a user namespace that maps every id to itself, as the initial one does."""
    return read_map("self", "uid") == INITIAL_MAP


def current_map() -> IdMap:
    """Return a map that gives a child namespace exactly the ids that this one has, under the same numbers."""
    return IdMap(
        tuple(IdRange(r.inside, r.inside, r.size) for r in read_map("self", "uid")),
        tuple(IdRange(r.inside, r.inside, r.size) for r in read_map("self", "gid")),
        setgroups=Path("/proc/self/setgroups").read_text().strip() == "allow",
    )


def write_maps(pid: int | str, ids: IdMap) -> None:
    """Write the maps of a process's new user namespace; each can be written once.

    A map of more than the writer's own id needs CAP_SETUID and CAP_SETGID in the parent namespace.
    """
    if not ids.setgroups:
        # Without privilege the kernel wants it given up before it lets a gid map be written.
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    for kind, ranges in (("uid", ids.uids), ("gid", ids.gids)):
        Path(f"/proc/{pid}/{kind}_map").write_text("".join(f"{r.inside} {r.outside} {r.size}\n" for r in ranges))


def subordinate_ids(file: Path, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the ranges (first, count) that subuid(5) or subgid(5) grants to a user, known by name or number."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ()
    fields = [line.split(":") for line in lines]
    return tuple(
        (int(first), int(count))
        for owner, first, count in (f for f in fields if len(f) == 3)
        if owner in names and first.isdigit() and count.isdigit() and int(count) > 0
    )


def map_with_helpers(pid: int, ids: IdMap) -> None:
    """Write maps with the set-user-id programs newuidmap(1) and newgidmap(1), from outside the new namespace.

    Raises OSError EPERM if they refuse, FileNotFoundError where they are not installed.
    """
    for program, ranges in (("newuidmap", ids.uids), ("newgidmap", ids.gids)):
        arguments = [program, str(pid), *(str(number) for r in ranges for number in r)]
        child = os.posix_spawnp(program, arguments, os.environ)
        if os.waitpid(child, 0)[1]:
            raise OSError(errno.EPERM, f"{program} refused the subordinate ids")
