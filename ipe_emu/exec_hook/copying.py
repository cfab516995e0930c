"""sendfile(2), splice(2), copy_file_range(2): securityfs has none of them, FUSE would carry them out somehow.

From a node they would copy nothing, a silent end of file (its size is 0). Programs fall back to read and write where
the call fails; so it must.
"""

import errno

from ipe_emu.errors import KernelError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Continue, Plan
from ipe_emu.linux.syscalls import signed_int


def plan_copy(caller: Caller, args: tuple[int, ...], *, which: tuple[int, int], securityfs: int) -> Plan:
    """Plan a call that copies between two descriptors: EINVAL if either is a node of the emulated securityfs.

    ``which`` says which arguments the descriptors are, ``securityfs`` is its device number. Raises KernelError as
    ``do_splice_direct()`` and ``do_splice()`` do for files without splice methods.
    """
    for index in which:
        try:
            st = caller.tracee.stat_fd(signed_int(args[index]))
        except FileNotFoundError:
            return Plan(Continue())  # EBADF, or EINVAL before it: nothing is copied
        if st.st_dev == securityfs:
            raise KernelError(errno.EINVAL, "securityfs does not splice", "do_splice_direct")
    return Plan(Continue())
