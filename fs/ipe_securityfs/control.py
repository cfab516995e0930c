"""The control socket: where it is, who may use it, and the threads that answer it.

Whoever reaches it can change what judges a rehearsal, so that a rehearsed program must not: the socket lies in a
directory that is its owner's alone, and both sides look at who the other is. It is never waited for in the thread
that serves the mount.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.errors import IpeEmuError, UserError
from ipe_emu.linux import procfs
from ipe_securityfs.wire import Lines, Message, ProtocolError

log = logging.getLogger("ipe_emu.control")

#: A path longer than this does not fit into sockaddr_un.
_MAX_SOCKET_PATH: Final = 107
#: Connections beyond these are closed at once.
_MAX_CONNECTIONS: Final = 64

Handler = Callable[[Message, "Peer", Lines], Message | None]


class NotAllowedError(IpeEmuError):
    """The other side of a control socket is not who it must be."""


@frozen
class Peer:
    """Who is connected (SO_PEERCRED, as of connect(2) or listen(2))."""

    pid: int
    uid: int
    gid: int


def runtime_directories() -> Iterator[Path]:
    """Yield where control sockets of this user may lie, the best first."""
    uid = os.geteuid()
    if uid == 0:
        yield Path("/run/ipe-emu")
    elif directory := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(directory) / "ipe-emu"
    yield Path(f"/tmp/ipe-emu-{uid}")  # noqa: S108 - checked in _private_directory


def make_runtime_directory() -> Path:
    """Return the first runtime directory that can be made, its owner's alone. UserError if none can."""
    reasons = []
    for directory in runtime_directories():
        try:
            if len(os.fsencode(directory)) + 40 > _MAX_SOCKET_PATH:
                raise UserError(f"{directory}: too long for a socket in it")  # noqa: TRY301 - any type
            directory.mkdir(mode=0o700, exist_ok=True)
            _check_private(directory)
        except (OSError, UserError) as error:
            reasons.append(str(error))
        else:
            return directory
    raise UserError("no directory for the control socket: " + "; ".join(reasons))


def _check_private(directory: Path) -> None:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UserError(f"{directory}: must be a directory of mode 0700 that belongs to you")


def key_of(mountpoint: str) -> str:
    """Return the name under which a mount point's files lie in the runtime directory.

    The same path is another mount point in another mount namespace. The path must be real; nothing of it is looked at.
    """
    namespace = procfs.namespace("self", "mnt")
    return hashlib.sha256(f"{namespace}\0".encode() + os.fsencode(mountpoint)).hexdigest()[:24]


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Hold the lock of one mount point for as long as this process lives or the block lasts; UserError if it is taken.

    The kernel lets go of it however the process ends, so that what is left behind never looks alive.
    """
    fd = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until nobody else of this user takes or tries a lock of the directory.

    Whoever only looks whether one is taken takes it for a moment, in which somebody else would believe that it is.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _locked(path: Path) -> int:
    with _alone_in(path.parent):
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder removed the file before letting go: a lock on it would keep nobody out.
                if os.fstat(fd).st_nlink:
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise UserError("an emulator is mounted there already; end it with `ipe-emu umount`") from None
            os.close(fd)


def sweep(directory: Path) -> None:
    """Remove what emulators that were killed have left in a runtime directory."""
    with _alone_in(directory):
        for lock in directory.glob("*.lock"):
            with contextlib.suppress(OSError):
                if not _is_held(lock):
                    for path in directory.glob(f"{lock.stem}.*"):
                        path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a mount point."""
    try:
        with _alone_in(path.parent):
            return _is_held(path)
    except OSError:
        return False


def _is_held(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def peer_of(connection: socket.socket) -> Peer:
    """Return who is connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", data))


def check_peer(peer: Peer) -> None:
    """NotAllowedError unless the peer is the same user, in the same user and pid namespaces as this process."""
    if peer.uid != os.geteuid():
        raise NotAllowedError(f"it belongs to user {peer.uid}")
    if peer.pid <= 0:
        raise NotAllowedError("it lives in another pid namespace")
    for kind in ("user", "pid"):
        try:
            same = procfs.namespace(peer.pid, kind) == procfs.namespace("self", kind)
        except OSError:
            same = False
        if not same:
            raise NotAllowedError(f"process {peer.pid} lives in another {kind} namespace, or cannot be looked at")


class Server:
    """Listens on ``path`` and gives each connection a thread; ``handle`` answers one request.

    Its answer is sent; None ends the connection. OSError and ProtocolError end it as well.
    """

    def __init__(self, path: Path, handle: Handler) -> None:
        self._path = path
        self._handle = handle
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # left by one that was killed: the caller holds the lock
            self._listener.bind(str(path))
            path.chmod(0o600)
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            raise

    def start(self) -> None:
        """Answer from now on, in threads that end with the process."""
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Listen no longer, and remove the socket."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._converse, args=(connection,), name="control-client", daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                peer = peer_of(connection)
                lines = Lines(connection)
                try:
                    check_peer(peer)
                except NotAllowedError as error:
                    log.warning("control connection refused: %s", error)
                    lines.send({"error": f"refused: {error}"})
                    return
                while (request := lines.receive()) is not None:
                    answer = self._handle(request, peer, lines)
                    if answer is None:
                        return
                    lines.send(answer)
        except (OSError, ProtocolError) as error:
            log.debug("control connection ended: %s", error)
        finally:
            self._slots.release()
