"""statfs(2): what stands for a file system says that it is one of the type that it stands for.

systemd looks for the hierarchy of cgroups, and takes a directory for a device's, by what this call says of /sys.
"""

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import define

from ipe_emu.errors import KernelError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.plan import Perform, Plan
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux.syscalls import AT_FDCWD, signed_int
from ipe_emu.rehearse.staging import SECURITYFS, SYSFS

#: Magic numbers (include/uapi/linux/magic.h) of what is something else here.
_MAGIC: Final = {SYSFS: 0x62656572, SECURITYFS: 0x73636673}
#: struct statfs of machines with 64 bits: type, block size, five counts, f_fsid, length of names, fragment size, flags.
_STATFS: Final = struct.Struct("@7q8s3q32x")
_PAGE: Final = 4096
_ST_VALID: Final = 0x20


@define(eq=False)
class Statfs:
    """Answers statfs(2) and fstatfs(2); ``devices`` are the st_dev of what is staged."""

    devices: Mapping[Path, int]

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that it answers."""
        return (Trap("statfs", self._plan_statfs), Trap("fstatfs", self._plan_fstatfs))

    def _plan_statfs(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan(caller, args[1], lambda: caller.look_up(AT_FDCWD, read_path(caller.tracee, args[0])))

    def _plan_fstatfs(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        return self._plan(caller, args[1], lambda: caller.descriptor(signed_int(args[0])))

    def _plan(self, caller: Caller, address: int, find: Callable[[], int | None]) -> Plan | None:
        """Plan what ``simple_statfs()`` says, for what is not of this type to this machine's kernel."""
        try:
            fd = find()
        except (KernelError, OSError):
            return None  # which the kernel finds too
        if fd is None:
            return None
        device = os.fstat(fd).st_dev
        magic = next((magic for path, magic in _MAGIC.items() if self.devices.get(path) == device), None)
        if magic is None:
            return None
        flags = os.fstatvfs(fd).f_flag | _ST_VALID
        packed = _STATFS.pack(magic, _PAGE, 0, 0, 0, 0, 0, bytes(8), 255, _PAGE, flags)
        return Plan(Perform(lambda: self._tell(caller, address, packed)))

    def _tell(self, caller: Caller, address: int, packed: bytes) -> int:
        caller.copy_out(address, packed)
        return 0
