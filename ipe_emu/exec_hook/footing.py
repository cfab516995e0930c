"""What the caller stands on, and the user namespace that the rehearsed tree gets.

A plain user first becomes root of a user namespace of his own. Below the namespace that the caller is root of, the
tree gets another one: what is mounted above it is locked in the tree's copy, and nothing that it does reaches us.

Real root's tree must not be real root too: it would own the disks, the kernel's controls, and the trust of every
system service. Its ids are shifted to some that nobody has, and the host's files are handed to it through mounts that
shift them back (mount_setattr(2), MOUNT_ATTR_IDMAP). Where that cannot be, its ids are root's, and a shield keeps
from it what root owns by file permissions alone.
"""

import contextlib
import enum
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from attrs import frozen

from ipe_emu.errors import CannotEmulateError
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.linux import capabilities, mounts, namespaces, process
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.namespaces import IdMap, IdRange, Namespace

_SUBUID: Final = Path("/etc/subuid")
_SUBGID: Final = Path("/etc/subgid")
#: The first of as many ids that stand for 0 and up in a tree of real root's: far above those that anybody is given.
_SHIFT: Final = 1 << 30
_SHIFTED: Final = IdMap((IdRange(0, _SHIFT, _SHIFT),), (IdRange(0, _SHIFT, _SHIFT),), setgroups=True)


class Kind(enum.Enum):
    """What the tree's root is outside; the value says it in words."""

    PLAIN = "the user who runs it"
    SHIFTED = "a user id that nobody else has"
    SHIELDED = "root, kept from devices and from the kernel's controls"


@frozen
class Footing:
    """``user_namespace`` is a descriptor of the tree's; ``root`` the uid and gid of its root outside."""

    kind: Kind
    user_namespace: int
    root: int
    notes: tuple[str, ...] = ()


def obtain(*, unshiftable: str | None = None, own_files: bool = False) -> Footing:
    """Find out, and if need be enter a user namespace of our own. Must run before this process has threads.

    ``unshiftable`` says what is to be seen inside whose files cannot be given to other ids, if anything is.
    ``own_files``: the tree sees no file system of the host, so that there is nothing to shift.
    CannotEmulateError where the machine does not allow it.
    """
    if not capabilities.has(Capability.SYS_ADMIN):
        notes = _enter_user_namespace()
        if not capabilities.has(Capability.SYS_ADMIN):
            raise CannotEmulateError(
                "a user namespace can be made here but gives no privileges in it (AppArmor restricts them)"
            )
        return Footing(Kind.PLAIN, _make_user_namespace(namespaces.current_map()), 0, notes)
    if not namespaces.is_initial():
        return Footing(Kind.PLAIN, _make_user_namespace(namespaces.current_map()), 0)
    if unshiftable is None:
        shifted = _make_user_namespace(_SHIFTED)
        if own_files or _can_shift(shifted):
            return Footing(Kind.SHIFTED, shifted, _SHIFT)
        os.close(shifted)
        unshiftable = "the files of the root directory's file system"
    note = (
        f"{unshiftable} cannot be given to other ids: the command runs as this machine's root, with devices and the"
        " kernel's controls kept from it, but not the services that trust root"
    )
    return Footing(Kind.SHIELDED, _make_user_namespace(namespaces.current_map()), 0, (note,))


@contextlib.contextmanager
def own_pipes(standing: Footing) -> Iterator[None]:
    """Let the tree's root open our standard streams by name (``>/dev/stderr``), as far as they are pipes.

    A pipe belongs to who made it, and with shifted ids that is somebody else. Terminals and files keep their owners.
    """
    changed: list[tuple[int, os.stat_result]] = []
    if standing.kind is Kind.SHIFTED:
        for fd in (0, 1, 2):
            with contextlib.suppress(OSError):  # closed
                status = os.fstat(fd)
                if stat.S_ISFIFO(status.st_mode) and str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("pipe:"):
                    os.fchown(fd, standing.root, standing.root)
                    changed.append((fd, status))
    try:
        yield
    finally:
        for fd, status in reversed(changed):
            os.fchown(fd, status.st_uid, status.st_gid)


def _can_shift(user_namespace: int) -> bool:
    root = mounts.clone(Path("/"), recursive=False)
    try:
        mounts.set_attributes(root, Attribute.IDMAP, user_namespace=user_namespace)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EPERM):  # not this file system; or shifted already
            return False
        raise
    finally:
        os.close(root)
    return True


def _make_user_namespace(ids: IdMap) -> int:
    """Return a descriptor of a new user namespace below this process's, held by a child for just long enough."""
    ready_out, ready_in = os.pipe()
    done_out, done_in = os.pipe()
    child = os.fork()
    if child == 0:
        _hold_user_namespace(ready_in, done_out, (ready_out, done_in))
    for fd in (ready_in, done_out):
        os.close(fd)
    try:
        said = os.read(ready_out, 4)
        if said != b"\0":
            number = int(said or b"0")
            raise CannotEmulateError(f"no user namespace can be made here: {os.strerror(number or errno.EPERM)}")
        namespaces.write_maps(child, ids)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotEmulateError(f"a user namespace cannot be given its ids here: {error.strerror}") from None
    finally:
        for fd in (ready_out, done_in):
            os.close(fd)
        os.waitpid(child, 0)


def _hold_user_namespace(ready: int, done: int, others: tuple[int, ...]) -> NoReturn:
    try:
        process.die_with_parent()
        for fd in others:
            os.close(fd)
        namespaces.unshare(Namespace.USER)
        namespaces.unshare(Namespace.MOUNT)  # one that belongs to it, or no file system could be made
        binfmt_misc.give_own_registry()
        os.write(ready, b"\0")
        os.read(done, 1)
    except OSError as error:
        os.write(ready, str(error.errno).encode())
    finally:
        os._exit(0)


def _enter_user_namespace() -> tuple[str, ...]:
    uid, gid = os.getuid(), os.getgid()
    subordinate = _subordinate(uid, gid)
    single = IdMap((IdRange(0, uid, 1),), (IdRange(0, gid, 1),), setgroups=False)
    if subordinate is None:
        _unshare_user()
        namespaces.write_maps("self", single)
        return ("only one user id: chown and su to others fail inside (no subordinate ids, see ipe-emu doctor)",)
    # The helpers must run outside, so the child that runs them is there before we leave.
    entered, left = os.pipe()
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        _map_from_outside(supervisor, subordinate, entered, left)
    os.close(entered)
    try:
        _unshare_user()
        os.write(left, b"\n")
    finally:
        os.close(left)
        failed = os.waitpid(child, 0)[1] != 0
    if failed:
        namespaces.write_maps("self", single)
        return ("only one user id: chown and su to others fail inside (newuidmap failed, see ipe-emu doctor)",)
    return ()


def _unshare_user() -> None:
    try:
        namespaces.unshare(Namespace.USER)
    except OSError as error:
        raise CannotEmulateError(f"no user namespace can be made here: {error.strerror}") from None


def _subordinate(uid: int, gid: int) -> IdMap | None:
    """Return root mapped to the caller, and from 1 up his subordinate ids; None if he has none."""
    names = [str(uid)]
    with contextlib.suppress(KeyError):
        names.append(pwd.getpwuid(uid).pw_name)
    uids = namespaces.subordinate_ids(_SUBUID, names)
    gids = namespaces.subordinate_ids(_SUBGID, names)
    if not uids or not gids:
        return None
    return IdMap(_after_root(uid, uids), _after_root(gid, gids), setgroups=True)


def _after_root(own: int, granted: tuple[tuple[int, int], ...]) -> tuple[IdRange, ...]:
    ranges = [IdRange(0, own, 1)]
    for first, size in granted:
        ranges.append(IdRange(ranges[-1].inside + ranges[-1].size, first, size))
    return tuple(ranges)


def _map_from_outside(supervisor: int, ids: IdMap, entered: int, left: int) -> NoReturn:
    """Be the child that maps: wait for the namespace, map, exit with what became of it. Never returns."""
    status = 1
    try:
        process.die_with_parent()
        os.close(left)
        if os.read(entered, 1):
            namespaces.map_with_helpers(supervisor, ids)
            status = 0
    except OSError:
        status = 1  # the parent maps its own id alone, and says so
    finally:
        os._exit(status)
