"""Events of devices (uevents), sent into a network namespace as its kernel would send them.

Source: ``uevent_net_rcv_skb()`` in lib/kobject_uevent.c: who has CAP_SYS_ADMIN over a network namespace may have the
kernel send an event there (since Linux 4.18). It adds SEQNUM.
"""

import errno
import os
import socket
import struct
from typing import Final

_NETLINK_KOBJECT_UEVENT: Final = 15
_SCM_CREDENTIALS: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_CREDENTIALS: Final = struct.Struct("=iii")
#: Types below this one are netlink's own (NLMSG_MIN_TYPE).
_TYPE: Final = 0x10
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_NLMSG_ERROR: Final = struct.Struct("=16xi")


def open_socket() -> int:
    """Return a descriptor through which events are sent into the network namespace of now."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT) as sender:
        return sender.detach()


def send(sender: socket.socket, event: bytes, owner: int) -> None:
    """Send one event, ``ACTION@DEVPATH`` and its variables, each with a NUL behind it. OSError if it is refused.

    ``owner`` is the uid and gid from which it comes, as this process names that of the receiver's root: whoever hears
    events trusts no other. Nobody need listen.
    """
    flags = _NLM_F_REQUEST | _NLM_F_ACK
    message = _HEADER.pack(_HEADER.size + len(event), _TYPE, flags, 0, 0) + event
    credentials = _CREDENTIALS.pack(os.getpid(), owner, owner)
    sender.sendmsg([message], [(socket.SOL_SOCKET, _SCM_CREDENTIALS, credentials)], 0, (0, 0))
    (answer,) = _NLMSG_ERROR.unpack_from(sender.recv(4096))
    if answer and -answer != errno.ESRCH:
        raise OSError(-answer, os.strerror(-answer))
