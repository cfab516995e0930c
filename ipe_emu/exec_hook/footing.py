"""What the caller stands on: real root, root of some namespace, or a plain user who first becomes that.

Afterwards this process has CAP_SYS_ADMIN over a user namespace, below which the rehearsed tree gets its own.
"""

import contextlib
import os
import pwd
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.errors import CannotEmulateError
from ipe_emu.linux import capabilities, namespaces, process
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.namespaces import IdMap, IdRange, Namespace

_SUBUID: Final = Path("/etc/subuid")
_SUBGID: Final = Path("/etc/subgid")


@frozen
class Footing:
    """How the sandbox is founded.

    ``ids`` is the map of the rehearsed tree's user namespace; ``owns_disks`` says that its root is the machine's root
    as far as file permissions go; ``notes`` is what the user should know of it.
    """

    ids: IdMap
    owns_disks: bool
    notes: tuple[str, ...] = ()


def obtain() -> Footing:
    """Find out, and if need be enter a user namespace of our own. Must run before this process has threads.

    CannotEmulateError where the machine does not allow it.
    """
    if capabilities.has(Capability.SYS_ADMIN):
        return Footing(namespaces.current_map(), owns_disks=namespaces.is_initial())
    notes = _enter_user_namespace()
    if not capabilities.has(Capability.SYS_ADMIN):
        raise CannotEmulateError(
            "a user namespace can be made here but gives no privileges in it (AppArmor restricts them)"
        )
    return Footing(namespaces.current_map(), owns_disks=False, notes=notes)


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


def _map_from_outside(supervisor: int, ids: IdMap, entered: int, left: int) -> None:
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
