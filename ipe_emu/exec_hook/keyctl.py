"""add_key(2) and keyctl(2), as far as they concern the kernel's own keyrings; everything else goes on.

The rehearsed machine's system keyrings are not this machine's, which nobody in a user namespace may touch anyhow. They
have numbers that are none of this machine's keys, found in /proc/keys, where keyctl(1) looks for ``%:.fs-verity``.
"""

import enum
import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Perform, Plan
from ipe_emu.exec_hook.session_keys import SessionKeys
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux import procfs
from ipe_emu.linux.syscalls import signed_int
from ipe_emu.lsm import Ipe
from ipe_emu.system_keyrings import Permission, SystemKeyrings

_LONGEST_TYPE: Final = 32
_LONGEST_DESCRIPTION: Final = 4096
_LARGEST_PAYLOAD: Final = (1 << 20) - 1
_UNSIGNED_INT: Final = 0xFFFFFFFF


class Operation(enum.IntEnum):
    """The operations of keyctl(2) that name keys (include/uapi/linux/keyctl.h)."""

    GET_KEYRING_ID = 0
    UPDATE = 2
    REVOKE = 3
    CHOWN = 4
    SETPERM = 5
    DESCRIBE = 6
    CLEAR = 7
    LINK = 8
    UNLINK = 9
    SEARCH = 10
    READ = 11
    INSTANTIATE = 12
    NEGATE = 13
    SET_TIMEOUT = 15
    ASSUME_AUTHORITY = 16
    GET_SECURITY = 17
    REJECT = 19
    INSTANTIATE_IOV = 20
    INVALIDATE = 21
    GET_PERSISTENT = 22
    PKEY_QUERY = 24
    RESTRICT_KEYRING = 29
    MOVE = 30
    WATCH_KEY = 32


#: Which arguments name keys, where it is not the first behind the operation alone (``keyctl()``).
_KEYS: Final[Mapping[Operation, tuple[int, ...]]] = MappingProxyType(
    {
        Operation.LINK: (1, 2),
        Operation.UNLINK: (1, 2),
        Operation.SEARCH: (1, 4),
        Operation.INSTANTIATE: (1, 4),
        Operation.NEGATE: (1, 3),
        Operation.REJECT: (1, 4),
        Operation.INSTANTIATE_IOV: (1, 4),
        Operation.GET_PERSISTENT: (2,),
        Operation.MOVE: (1, 2, 3),
    }
)
#: After these a key that was added need not be there any more, or not as it was.
_TAKE_AWAY: Final = frozenset({
    Operation.UPDATE, Operation.REVOKE, Operation.CHOWN, Operation.SETPERM, Operation.CLEAR, Operation.UNLINK,
    Operation.SET_TIMEOUT, Operation.INVALIDATE, Operation.MOVE,
})  # fmt: skip
#: What an operation that is not emulated needs of a key before anything else; where that is not granted, it fails.
_NEEDS: Final[Mapping[Operation, Permission]] = MappingProxyType(
    {
        Operation.CHOWN: Permission.SETATTR,
        Operation.SET_TIMEOUT: Permission.SETATTR,
        Operation.INVALIDATE: Permission.SEARCH,
        Operation.GET_SECURITY: Permission.VIEW,
        Operation.PKEY_QUERY: Permission.SEARCH,
        Operation.WATCH_KEY: Permission.VIEW,
    }
)


@define(eq=False)
class Keyctl:
    """Answers for the system keyrings of one machine, from ``begin`` on."""

    session_keys: SessionKeys = field(factory=SessionKeys, init=False)
    keyrings: SystemKeyrings = field(init=False)
    ipe: Ipe = field(init=False)
    _root: int = field(init=False)
    _of_this_machine: int | None = field(default=None, init=False)

    def begin(self, ipe: Ipe, root: int, *, dm_verity_unsealed: bool = False) -> None:
        """Make the keyrings of a machine whose root has the uid ``root``, as we see it.

        What is in them is what ``ipe`` trusts, from now on as well. ``dm_verity_unsealed`` is a kernel parameter.
        """
        self.ipe = ipe
        self._root = root
        self.keyrings = SystemKeyrings(ipe.profile, ipe.keyrings, ipe.trust, dm_verity_unsealed)

    def show_beside(self, keys: int | None) -> None:
        """Have ``proc_keys`` also show what a descriptor of this machine's /proc/keys does."""
        self._of_this_machine = keys

    def proc_keys(self) -> bytes:
        """Return the text of /proc/keys."""
        theirs = b"" if self._of_this_machine is None else procfs.read_again(self._of_this_machine)
        return b"".join(sorted([*self.keyrings.proc_keys().splitlines(True), *theirs.splitlines(True)]))

    @property
    def traps(self) -> tuple[Trap, ...]:
        """The calls."""
        return (Trap("add_key", self.plan_add_key), Trap("keyctl", self.plan_keyctl))

    # -- add_key ------------------------------------------------------------------------------------------------

    def plan_add_key(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan add_key(type, description, payload, size, keyring)."""
        ring = signed_int(args[4])
        ours = self.keyrings.knows(ring)
        try:
            kind, description, payload = self._new_key(caller, args)
        except KernelError:
            if ours:
                raise
            return None  # the kernel will say the same
        if ours:
            return Plan(Perform(lambda: self._add(caller, ring, kind, description, payload)))
        self.session_keys.add(caller, ring, kind, description, payload)
        return None

    def _new_key(self, caller: Caller, args: tuple[int, ...]) -> tuple[bytes, bytes, bytes]:
        """Read a key's type, description and payload, and find what is wrong with them in the kernel's order."""
        if args[3] > _LARGEST_PAYLOAD:
            raise KernelError(errno.EINVAL, "a payload of 1 MiB or more", "add_key")
        kind = _key_type(caller, args[0])
        description = _string(caller, args[1], _LONGEST_DESCRIPTION) if args[1] else b""
        if description.startswith(b".") and kind.startswith(b"keyring"):
            raise KernelError(errno.EPERM, "keyrings with such names are the kernel's", "add_key")
        return kind, description, caller.copy_in(args[2], args[3]) if args[3] else b""

    def _add(self, caller: Caller, ring: int, kind: bytes, description: bytes, payload: bytes) -> int:
        is_ipe = self.keyrings.is_ipe(ring)
        serial = self.keyrings.add_key(
            ring,
            kind,
            description,
            payload,
            is_root=self._is_root(caller),
            admit=(lambda: self.ipe.admit_key(caller.subject, caller.program())) if is_ipe else None,
        )
        if is_ipe:
            self.ipe.note_ipe_key(self.keyrings.name_of(serial))
        return serial

    # -- keyctl -------------------------------------------------------------------------------------------------

    def plan_keyctl(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Plan keyctl(operation, ...): ours, if it names a key of ours."""
        try:
            operation = Operation(signed_int(args[0]))
        except ValueError:
            return None
        named = [signed_int(args[n]) for n in _KEYS.get(operation, (1,))]
        if not any(self.keyrings.knows(number) for number in named):
            if operation in _TAKE_AWAY:
                self.session_keys.forget(caller)
            return None
        is_root = self._is_root(caller)
        return Plan(Perform(lambda: self._perform(operation, caller, args[1:], is_root=is_root)))

    def _perform(self, operation: Operation, caller: Caller, args: tuple[int, ...], *, is_root: bool) -> int:
        keyrings = self.keyrings
        key, second = signed_int(args[0]), signed_int(args[1])
        match operation:
            case Operation.GET_KEYRING_ID:
                return keyrings.get_keyring_id(key, is_root=is_root)
            case Operation.SETPERM:
                keyrings.set_permissions(key, args[1] & _UNSIGNED_INT, is_root=is_root)
            case Operation.DESCRIBE:
                return _give(caller, keyrings.describe(key, is_root=is_root), args[1], args[2] & _UNSIGNED_INT)
            case Operation.CLEAR:
                keyrings.clear(key, is_root=is_root)
            case Operation.LINK:
                self._link(key, second, is_root=is_root)
            case Operation.UNLINK:
                self._unlink(key, second, is_root=is_root)
            case Operation.SEARCH:
                return self._search(caller, args, is_root=is_root)
            case Operation.READ:
                return _give(caller, keyrings.read(key, is_root=is_root), args[1], args[2])
            case Operation.RESTRICT_KEYRING:
                self._restrict(caller, args, is_root=is_root)
            case _:
                self._not_emulated(operation, key, is_root=is_root)
        return 0

    def _link(self, key: int, ring: int, *, is_root: bool) -> None:
        if self.keyrings.knows(ring):
            self.keyrings.require(ring, Permission.WRITE, is_root=is_root)
        if self.keyrings.knows(key):
            self.keyrings.require(key, Permission.LINK, is_root=is_root)
        raise NotJudgedError("linking a key into one of the kernel's keyrings, or one of its keys elsewhere")

    def _unlink(self, key: int, ring: int, *, is_root: bool) -> None:
        if not self.keyrings.knows(ring):
            raise KernelError(errno.ENOENT, "one of the kernel's keys is in no other keyring", "__key_unlink_begin")
        self.keyrings.unlink(key, ring, is_root=is_root)

    def _search(self, caller: Caller, args: tuple[int, ...], *, is_root: bool) -> int:
        kind = _key_type(caller, args[1])
        description = _string(caller, args[2], _LONGEST_DESCRIPTION)
        start, destination = signed_int(args[0]), signed_int(args[3])
        if not self.keyrings.knows(start):
            raise NotJudgedError("a search whose result is linked into one of the kernel's keyrings")
        found = self.keyrings.search(start, kind, description, is_root=is_root)
        if destination:
            self.keyrings.require(found, Permission.LINK, is_root=is_root)
        return found

    def _restrict(self, caller: Caller, args: tuple[int, ...], *, is_root: bool) -> None:
        ring = signed_int(args[0])
        self.keyrings.require(ring, Permission.SETATTR, is_root=is_root)
        if bool(args[1]) != bool(args[2]):
            raise KernelError(errno.EINVAL, "a type without a restriction, or the reverse", "keyctl_restrict_keyring")
        kind = _key_type(caller, args[1]) if args[1] else None
        text = _string(caller, args[2], _LONGEST_DESCRIPTION) if args[2] else b""
        self.keyrings.restrict_keyring(ring, kind, text, is_root=is_root)

    def _not_emulated(self, operation: Operation, key: int, *, is_root: bool) -> None:
        if self.keyrings.knows(key):
            if operation in _NEEDS:
                self.keyrings.require(key, _NEEDS[operation], is_root=is_root)
            elif operation is Operation.UPDATE:
                self.keyrings.require(key, Permission.WRITE, is_root=is_root)
                raise KernelError(errno.EOPNOTSUPP, "keys of this type cannot be updated", "key_update")
            elif operation is Operation.REVOKE:
                self._require_either(key, is_root=is_root)
        raise NotJudgedError(f"keyctl {operation.name} of one of the kernel's keys")

    def _require_either(self, key: int, *, is_root: bool) -> None:
        try:
            self.keyrings.require(key, Permission.WRITE, is_root=is_root)
        except KernelError:
            self.keyrings.require(key, Permission.SETATTR, is_root=is_root)

    def _is_root(self, caller: Caller) -> bool:
        return caller.tracee.status.fsuid == self._root


def _give(caller: Caller, data: bytes, buffer: int, size: int) -> int:
    """Copy an answer out where it fits; return how long it is."""
    if buffer and size >= len(data):
        caller.copy_out(buffer, data)
    return len(data)


def _key_type(caller: Caller, address: int) -> bytes:
    """Read the name of a key's type (``key_get_type_from_user()``)."""
    kind = _string(caller, address, _LONGEST_TYPE)
    if not kind:
        raise KernelError(errno.EINVAL, "an empty type", "key_get_type_from_user")
    if kind.startswith(b"."):
        raise KernelError(errno.EPERM, "a type of the kernel's own", "key_get_type_from_user")
    return kind


def _string(caller: Caller, address: int, limit: int) -> bytes:
    """Read a string that ends within ``limit`` bytes: EFAULT, EINVAL (``strndup_user()``)."""
    try:
        text = caller.tracee.string(address, limit)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise KernelError(errno.EFAULT, "a string that cannot be read", "strndup_user") from None
    if text is None:
        raise KernelError(errno.EINVAL, f"a string of {limit} bytes or more", "strndup_user")
    return text
