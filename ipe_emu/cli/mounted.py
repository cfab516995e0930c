"""Finding a mounted emulator, and asking it."""

import os
from typing import TYPE_CHECKING

from ipe_emu.cli.output import announce, escape, say
from ipe_emu.errors import UserError

if TYPE_CHECKING:
    from ipe_securityfs.client import Connection
    from ipe_securityfs.wire import Message


def connect(directory: str | None) -> "Connection":
    """Connect to the emulator mounted on ``directory``; without one, to the only one that this user has mounted.

    UserError if there is none, or more than one to choose from.
    """
    from ipe_securityfs.client import Connection

    if directory is not None:
        return Connection.open(directory)
    found = list(_connections())
    if len(found) == 1:
        return found[0]
    for connection in found:
        connection.close()
    if not found:
        raise UserError("no emulator is mounted by this user; `ipe-emu mount DIR` mounts one")
    names = ", ".join(escape(os.fsencode(connection.mountpoint)) for connection in found)
    raise UserError(f"which one? mounted are {names}")


def _connections() -> "list[Connection]":
    from ipe_emu.linux.mounts import mounts
    from ipe_securityfs.client import Connection
    from ipe_securityfs.unmount import FILE_SYSTEM

    found = []
    for path in dict.fromkeys(mount.path for mount in mounts() if mount.kind == FILE_SYSTEM):
        try:
            found.append(Connection.open(os.fsdecode(path)))
        except UserError:  # somebody else's, or dead
            continue
    return found


def ask(connection: "Connection", request: str, **fields: object) -> "Message":
    """Ask for something; what the emulator could not do becomes a UserError with its words."""
    from ipe_securityfs.client import RequestError

    try:
        return connection.request(request, **fields)
    except RequestError as error:
        raise UserError(escape(str(error))) from None


def status_of(connection: "Connection") -> "Message":
    """Ask what it holds, having said which kernel it emulates."""
    status = ask(connection, "status")
    announce(status["profile"])
    say(f"the emulator on {escape(os.fsencode(connection.mountpoint))}")
    return status
