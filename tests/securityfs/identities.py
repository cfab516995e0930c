"""As whom a recorded step is done: what a child of the recorder gives up for good."""

import os
import sys

from ipe_emu.linux import syscalls

_MAC_ADMIN_BIT = 1 << 1


def become(who: str) -> None:
    """Give up what ``who`` does not have."""
    if who == "uid 1000":
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
    elif who == "root without CAP_MAC_ADMIN":
        drop_mac_admin()
    else:
        assert who == "root", who


def drop_mac_admin() -> None:
    header, sets = syscalls.writable(8), syscalls.writable(24)
    header.raw = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    syscalls.call("capget", header, sets)
    effective_high = 12  # of two words each: effective, permitted, inheritable; CAP_MAC_ADMIN is bit 33
    word = int.from_bytes(sets.raw[effective_high : effective_high + 4], sys.byteorder) & ~_MAC_ADMIN_BIT
    sets.raw = sets.raw[:effective_high] + word.to_bytes(4, sys.byteorder) + sets.raw[effective_high + 4 :]
    syscalls.call("capset", header, sets)
