"""As whom a recorded step is done: what a child of the recorder gives up for good."""

import os
import sys
from typing import Any

from ipe_emu.linux.syscalls import call, writable

_MAC_ADMIN_BIT = 1 << 1
_CLONE_NEWUSER = 0x10000000
_PR_SET_KEEPCAPS = 8
#: The version of the sets, and the calling thread.
_HEADER = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)


def become(who: str) -> None:
    """Give up what ``who`` does not have."""
    if who == "uid 1000":
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
    elif who == "root without CAP_MAC_ADMIN":
        drop_mac_admin()
    elif who == "root in a user namespace of its own":
        call("unshare", _CLONE_NEWUSER)
    elif who == "uid 1000 with capabilities":
        call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        _make_effective_what_is_permitted()
    else:
        assert who == "root", who


def _capabilities() -> tuple[Any, Any]:
    header, sets = writable(8), writable(24)
    header.raw = _HEADER
    call("capget", header, sets)
    return header, sets


def _make_effective_what_is_permitted() -> None:
    header, sets = _capabilities()
    words = sets.raw
    sets.raw = words[4:8] + words[4:12] + words[16:20] + words[16:24]
    call("capset", header, sets)


def drop_mac_admin() -> None:
    header, sets = _capabilities()
    effective_high = 12  # of two words each: effective, permitted, inheritable; CAP_MAC_ADMIN is bit 33
    word = int.from_bytes(sets.raw[effective_high : effective_high + 4], sys.byteorder) & ~_MAC_ADMIN_BIT
    sets.raw = sets.raw[:effective_high] + word.to_bytes(4, sys.byteorder) + sets.raw[effective_high + 4 :]
    call("capset", header, sets)
