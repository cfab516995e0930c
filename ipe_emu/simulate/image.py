"""The files of an image, mounted for this process alone."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ipe_emu.errors import CannotEmulateError, UserError
from ipe_emu.exec_hook import footing
from ipe_emu.linux import mounts, namespaces, process
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.volumes import helper, programs
from ipe_emu.volumes.recognise import Kind

_PREFIX: Final = "ipe-emu-image."
_COPIED_AT_ONCE: Final = 64 << 20


@contextmanager
def mounted(kind: Kind, image: int, size: int) -> Iterator[Path]:
    """Show the files of the file system in the first ``size`` bytes of an image at a directory, read-only.

    This process leaves its mount namespace for one of its own, and a plain user his user namespace as well, for good;
    it must have no threads. An erofs image is copied to a temporary directory, the others are read by their programs.
    CannotEmulateError where this machine cannot do that; UserError with what the program says of the image.
    """
    program = programs.needed(kind)
    alone = _alone(image, size)
    standing = footing.obtain(unshiftable="an image")
    os.close(standing.user_namespace)
    try:
        namespaces.unshare(Namespace.MOUNT)
        mounts.make_private()
    except OSError as error:
        raise CannotEmulateError(f"nothing can be mounted here: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        place = Path(name)
        if kind is Kind.EROFS:
            _extract(program, alone, place)
            yield place
            return
        try:
            served = helper.mount(kind, program, alone, place, "image")
        except OSError as error:
            raise UserError(f"cannot be mounted: {error.strerror}") from None
        mounts.attach(served.mount, place)
        os.close(served.mount)
        try:
            yield place
        finally:
            mounts.detach(bytes(place))
            if served.helper is not None:
                process.send_signal(served.helper, signal.SIGKILL)
                os.waitid(os.P_PIDFD, served.helper, os.WEXITED)
                os.close(served.helper)


def _alone(image: int, size: int) -> int:
    """Return a descriptor of a file that ends where the verified data end: what is behind them is nobody's word."""
    if os.lseek(image, 0, os.SEEK_END) == size:
        return image
    copy = os.open(tempfile.gettempdir(), os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    done = 0
    while done < size:
        count = os.sendfile(copy, image, done, min(_COPIED_AT_ONCE, size - done))
        if not count:
            raise UserError(f"the image ends at byte {done}, and its data have {size}")
        done += count
    return copy


def _extract(program: str, image: int, place: Path) -> None:
    """Copy the files to ``place``, in a mount namespace where nothing else can be written: the image may be hostile."""
    child = os.fork()
    if child == 0:
        status, said = 1, b"?"
        try:
            process.die_with_parent()
            namespaces.unshare(Namespace.MOUNT)
            own = mounts.clone(place, recursive=False)
            mounts.set_attributes(Path("/"), Attribute.RDONLY, recursive=True)
            mounts.attach(own, place)
            helper.extract(program, image, place)
            status, said = 0, b""
        except OSError as error:
            said = (error.strerror or str(error)).encode()
        finally:
            os.write(2, b"ipe-emu: " + said + b"\n" if said else b"")
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise UserError("cannot be extracted (what fsck.erofs says stands above)")
