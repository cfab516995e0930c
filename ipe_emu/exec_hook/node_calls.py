"""Calls on nodes that never come to whoever serves them: reads and writes of no bytes, preadv2(2) with flags, seeking.

To FUSE a read or write of nothing has succeeded, flags and positions are its own affair, and every file can be polled;
securityfs asks the node.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable
from typing import Final

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller, entry_name
from ipe_emu.exec_hook.plan import Continue, Plan
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.seccomp import Action, AnyBit, Masked, Rule
from ipe_emu.linux.syscalls import signed_int

_ALL_BITS: Final = 0xFFFFFFFF
#: The one flag that do_loop_readv_writev() takes no notice of.
_RWF_HIPRI: Final = 1
_UIO_MAXIOV: Final = 1024
_SEGMENT: Final = struct.Struct("=QQ")

_EPOLL_CTL_ADD: Final = 1
#: sizeof(struct epoll_event), of which the pointer is looked at before the file is.
_EPOLL_EVENT: Final = 12
#: Whence of lseek(2), the largest.
_SEEK_MAX: Final = 4

#: The rules of the calls that are planned here. Whether a call is of a node, a filter cannot see. lseek(2) is looked at
#: where it goes back to the beginning, or asks for the position or the size: with that, programs find out whether they
#: can seek. All others would cost programs dearly that seek again and again in files of their own.
RULES: Final = (
    *(Rule(name, Action.NOTIFY, Masked(2, _ALL_BITS, 0)) for name in ("read", "write", "pread64", "pwrite64")),
    Rule("preadv2", Action.NOTIFY, AnyBit(5, _ALL_BITS & ~_RWF_HIPRI)),
    Rule("lseek", Action.NOTIFY, Masked(1, _ALL_BITS, 0)),
    Rule("epoll_ctl", Action.NOTIFY, Masked(1, _ALL_BITS, _EPOLL_CTL_ADD)),
)

#: What a session serves beside the securityfs, by the names in its root (`ipe_securityfs.subtrees`).
_BESIDE: Final = frozenset({b"images", b"devices", b"texts", b"mapper"})
_BOOLEANS: Final = frozenset({b"success_audit", b"enforce", b"active", b"activate", b"delete"})
_POLICIES: Final = frozenset({b"new_policy", b"update"})


def plan_read(caller: Caller, args: tuple[int, ...], *, securityfs: int) -> Plan:
    """Plan read(2) or pread(2) of nothing: the error that reading the node gives, if it gives one (``vfs_read()``)."""
    node = None if args[2] else _open_node(caller, args[0], securityfs, caller.may_read)
    if node is not None:
        _read(node)
    return Plan(Continue())


def plan_preadv2(caller: Caller, args: tuple[int, ...], *, securityfs: int) -> Plan:
    """Plan preadv2(fd, vector, count, offset, -, flags) with flags: EOPNOTSUPP (``do_loop_readv_writev()``).

    What cannot be read at all, and a vector of no bytes, come before that.
    """
    node = _open_node(caller, args[0], securityfs, caller.may_read)
    if node is None or not 0 <= args[2] <= _UIO_MAXIOV:
        return Plan(Continue())
    vector = caller.copy_in(args[1], _SEGMENT.size * args[2])
    _read(node, missing=False)
    if any(length for _, length in _SEGMENT.iter_unpack(vector)):
        raise KernelError(errno.EOPNOTSUPP, "securityfs knows no flags of preadv2", "do_loop_readv_writev")
    return Plan(Continue())


def plan_write(caller: Caller, args: tuple[int, ...], *, securityfs: int) -> Plan:
    """Plan write(2) or pwrite(2) of nothing, which no node takes: the handler's first error for no data.

    Whether the node was opened with the capability is not to be seen from here; what the caller has now stands for it.
    """
    node = None if args[2] else _open_node(caller, args[0], securityfs, caller.may_write)
    if node is None:
        return Plan(Continue())
    name = entry_name(node)
    if name not in _BOOLEANS | _POLICIES:
        raise KernelError(errno.EINVAL, "the node cannot be written", "vfs_write")
    if not caller.capable(Capability.MAC_ADMIN):
        raise KernelError(errno.EPERM, "the caller is without CAP_MAC_ADMIN", "file_ns_capable")
    if name in _BOOLEANS:
        raise KernelError(errno.EINVAL, "nothing is no boolean", "kstrtobool")
    if not os.fstat(node).st_nlink:
        raise KernelError(errno.ENOENT, "the policy was deleted", "update_policy")
    raise KernelError(errno.EBADMSG, "nothing is no signed policy", "pkcs7_parse_message")


def plan_lseek(caller: Caller, args: tuple[int, ...], *, securityfs: int) -> Plan:
    """Plan lseek(fd, 0, whence): ESPIPE for nodes of IPE, which have no ``llseek`` (``vfs_llseek()``)."""
    node = caller.descriptor(signed_int(args[0]))
    if node is None or caller.stat(node).st_dev != securityfs or args[2] & _ALL_BITS > _SEEK_MAX:
        return Plan(Continue())
    names = _names_of_file(caller, node)
    if names[:1] == [b"ipe"] and caller.may_use(signed_int(args[0])):
        raise KernelError(errno.ESPIPE, "nodes of IPE have no position", "vfs_llseek")
    return Plan(Continue())


def plan_epoll_ctl(caller: Caller, args: tuple[int, ...], *, securityfs: int) -> Plan:
    """Plan epoll_ctl(epoll, EPOLL_CTL_ADD, fd, event): EPERM for files of securityfs, which have no ``poll``."""
    node = caller.descriptor(signed_int(args[2]))
    if node is None or caller.stat(node).st_dev != securityfs or not _names_of_file(caller, node):
        return Plan(Continue())
    caller.copy_in(args[3], _EPOLL_EVENT)
    epoll = caller.descriptor(signed_int(args[0]))
    if epoll is None or not caller.may_use(signed_int(args[2])):
        return Plan(Continue())  # EBADF, as there
    raise KernelError(errno.EPERM, "a file of securityfs cannot be polled", "do_epoll_ctl")


def _names_of_file(caller: Caller, node: int) -> list[bytes]:
    """Return the names that lead to a file of the securityfs, none for what else its session serves (`subtrees`)."""
    if not stat.S_ISREG(caller.stat(node).st_mode):
        return []
    try:
        _, location = caller.locate(node)
    except NotJudgedError:  # a mount that nobody sees: a disk that was handed over
        return []
    names = [] if location is None else location.path.split(b"/")[1:]
    if names[:1] == [b"security"]:
        return names[1:]
    return [] if names[:1] and names[0] in _BESIDE else names


def _open_node(caller: Caller, register: int, securityfs: int, may: Callable[[int], bool]) -> int | None:
    """Return an O_PATH descriptor of the node that a descriptor of the caller's is open on; None if it is another."""
    number = signed_int(register)
    node = caller.descriptor(number)
    return node if node is not None and caller.stat(node).st_dev == securityfs and may(number) else None


def _read(node: int, *, missing: bool = True) -> None:
    """Read the node; KernelError with what it answers, ENOENT only if ``missing`` is to be told."""
    try:
        fd = os.open(b"/proc/self/fd/%d" % node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.pread(fd, 1, 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno == errno.EINVAL or (missing and error.errno == errno.ENOENT):
            raise KernelError(error.errno, "the node cannot be read", "vfs_read") from None
        if error.errno not in (errno.ENOENT, errno.EISDIR):
            raise


#: What plans each of them; each wants to know the device number of the emulated ``securityfs``.
PLANS: Final[dict[str, Callable[..., Plan]]] = {
    "read": plan_read,
    "pread64": plan_read,
    "write": plan_write,
    "pwrite64": plan_write,
    "preadv2": plan_preadv2,
    "lseek": plan_lseek,
    "epoll_ctl": plan_epoll_ctl,
}
