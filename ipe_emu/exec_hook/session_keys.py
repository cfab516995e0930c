"""What a process has put into keyrings of its own, for those in the kernel that look a key up by its name there.

The signature of a root hash comes to dm-verity in this way: as a key of type "user" that request_key(9) finds in the
keyrings of whoever loads the table. The calls go on to this machine's kernel, which is not asked again: it would not
show us another process's keys. Two of the keyrings are sure to be searched, and to be nobody else's: the thread's and
the process's, which end with a fork and with execve(2). Whether a session's or a user's keyring is searched depends on
a history that began before the rehearsal.
"""

from collections.abc import Hashable
from typing import Final

from attrs import define, field, frozen

from ipe_emu.errors import NotJudgedError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.linux.tracee import Tracee

THREAD_KEYRING: Final = -1
PROCESS_KEYRING: Final = -2
#: Keys that are remembered; a process that adds more overwrites the oldest.
_MOST: Final = 256


@frozen
class _Added:
    """A key: its keyring, and who put it there."""

    kind: bytes
    description: bytes
    payload: bytes
    ring: int
    owner: Hashable


@define(eq=False)
class SessionKeys:
    """The keys of a rehearsed tree's processes, as far as they were seen to be added."""

    _added: list[_Added] = field(factory=list, init=False)

    def add(self, caller: Caller, ring: int, kind: bytes, description: bytes, payload: bytes) -> None:
        """Note that a caller adds a key to a keyring that is not one of the kernel's own."""
        key = _Added(kind, description, payload, ring, _owner(caller, ring))
        self._added = [known for known in self._added if not _replaces(key, known)][-_MOST:]
        self._added.append(key)

    def forget(self, caller: Caller) -> None:
        """Note that a caller takes keys away, or changes them: which, its numbers do not tell."""
        owners = {_owner(caller, THREAD_KEYRING), _owner(caller, PROCESS_KEYRING)}
        self._added = [known for known in self._added if known.owner not in owners]

    def find(self, caller: Caller, kind: bytes, description: bytes) -> bytes | None:
        """Return the payload of the key that the caller's kernel would find (``request_key()``), None if it has none.

        NotJudgedError where it may lie in a keyring of which it is not known whether it is searched.
        """
        same = [known for known in self._added if (known.kind, known.description) == (kind, description)]
        for ring in (THREAD_KEYRING, PROCESS_KEYRING):
            owner = _owner(caller, ring)
            for known in same:
                if known.ring == ring and known.owner == owner:
                    return known.payload
        if any(known.ring not in (THREAD_KEYRING, PROCESS_KEYRING) for known in same):
            raise NotJudgedError(
                f"whether the kernel finds the key {description!r} in a session's or a user's keyring;"
                " veritysetup --root-hash-signature uses the thread's"
            )
        return None


def _owner(caller: Caller, ring: int) -> Hashable:
    """Return what identifies a thread or process between two calls of execve(2), and no other one."""
    tracee = caller.tracee
    if ring == THREAD_KEYRING:
        return ring, tracee.pid, tracee.start_time(), tracee.random_bytes()
    if ring == PROCESS_KEYRING:
        process = Tracee(tracee.status.tgid)
        return ring, process.pid, process.start_time(), tracee.random_bytes()
    return ring


def _replaces(new: _Added, old: _Added) -> bool:
    return (new.kind, new.description, new.ring, new.owner) == (old.kind, old.description, old.ring, old.owner)
