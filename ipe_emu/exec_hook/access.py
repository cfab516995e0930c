"""Whether a caller may search a directory, execute a file or write to it, as far as mode bits say so for certain.

The kernel of this machine checks permissions itself when it carries a call out. They are looked at here only so that
a call that fails by them raises no event before, and for calls that are not carried out. What is uncertain are ACLs
and ids without a mapping.
"""

import os
from typing import Final

from attrs import frozen

from ipe_emu.linux import capabilities
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.tracee import Tracee

_ACL: Final = "system.posix_acl_access"
# What the kernel shows for an id that has no mapping in the reader's user namespace (overflowuid).
_OVERFLOW_ID: Final = 65534


@frozen
class Access:
    """The ids by which the kernel judges a caller's access to files; ``override`` where mode bits do not bind it."""

    override: bool
    fsuid: int = 0
    fsgid: int = 0
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, tracee: Tracee) -> "Access":
        """Take them from a caller. A capability of a nested user namespace counts here as well."""
        if capabilities.effective(tracee.pid) >> Capability.DAC_OVERRIDE & 1:
            return EVERYTHING
        status = tracee.status
        return cls(override=False, fsuid=status.fsuid, fsgid=status.fsgid, groups=status.groups)

    def forbids_execution(self, st: os.stat_result, fd: int) -> bool:
        """Whether the mode bits of ``fd``, an O_PATH descriptor with status ``st``, certainly forbid to execute it.

        For a directory: to search it. A caller with ``override`` is not looked at (kernel: ``generic_permission()``).
        """
        return not self._permits(0o1, st) and self._is_certain(st, fd)

    def permits_writing(self, st: os.stat_result, fd: int) -> bool | None:
        """Whether the mode bits permit to write to a file; None if that is not certain. Arguments as above."""
        return self._permits(0o2, st) if self._is_certain(st, fd) else None

    def _permits(self, bit: int, st: os.stat_result) -> bool:
        if self.override:
            return True
        group = 3 if st.st_gid == self.fsgid or st.st_gid in self.groups else 0
        shift = 6 if st.st_uid == self.fsuid else group
        return bool(st.st_mode >> shift & bit)

    def _is_certain(self, st: os.stat_result, fd: int) -> bool:
        if self.override:
            return True
        if _OVERFLOW_ID in (self.fsuid, st.st_uid, st.st_gid):
            return False
        try:
            os.getxattr(f"/proc/self/fd/{fd}", _ACL)
        except OSError:
            return True
        return False


#: Of whom mode bits bind in nothing.
EVERYTHING: Final = Access(override=True)
