"""The agent's part in the FUSE session: it mounts it where nobody sees it, and from it what is to be seen.

The session serves the securityfs and, beside it, the images of the volumes, which the programs that read them open,
and what /proc/keys shows.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from ipe_emu.exec_hook import fuse_abort
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.exec_hook.mount_plan import SECURITYFS, SecurityFs, shown
from ipe_emu.linux import mounts, namespaces
from ipe_emu.linux.namespaces import Namespace

if TYPE_CHECKING:
    from ipe_emu.volumes.helper import Mounted
    from ipe_emu.volumes.recognise import Kind

#: A directory that is there, and that nobody needs meanwhile.
_STAGING: Final = Path("/sys")
#: The subtrees of the session (``ipe_securityfs.subtrees``).
_SECURITY: Final = "security"
_IMAGES: Final = "images"
_KEYS: Final = "texts/keys"


@frozen
class PlannedVolume:
    """A volume to be mounted at ``directory``.

    The session serves its image as ``images/NAME``; ``name`` is also what the mapped device is called. ``program``
    reads file systems of this ``kind``.
    """

    name: str
    directory: Path
    kind: "Kind"
    program: str

    def describe(self) -> str:
        """Return what is done, in words."""
        return f"mount {self.name}, {self.kind.value} on dm-verity, on {shown(self.directory)} ({self.program})"


@frozen
class Prepared:
    """Detached mounts, to be attached when all else is in its place; ``keys`` once there is a /proc."""

    securityfs: int
    keys: int
    volumes: "Sequence[tuple[PlannedVolume, Mounted]]"

    def attach(self, channel: Channel) -> None:
        """Attach all but ``keys``.

        Sends ``volume`` for each volume: its root's st_dev and st_ino, and a pidfd of the program that serves it.
        """
        mounts.attach(self.securityfs, SECURITYFS)
        os.close(self.securityfs)
        for volume, mounted in self.volumes:
            mounts.attach(mounted.mount, volume.directory)
            fds = [] if mounted.helper is None else [mounted.helper]
            root = os.fstat(mounted.mount)
            channel.send("volume", {"device": root.st_dev, "inode": root.st_ino}, fds)
            for fd in (mounted.mount, *fds):
                os.close(fd)


def prepare(
    channel: Channel, fuse: int, ending: int, volumes: Sequence[PlannedVolume], user_namespace: int
) -> Prepared:
    """Mount the session, tell the supervisor, and mount the volumes and the securityfs from it.

    To be done before the host's tree is changed, for the programs need its /dev and /proc. Sends ``fuse`` as soon as
    there is something to serve, and ``unmountable`` for a volume that cannot be mounted. ``ending`` is for
    `fuse_abort.start`.
    """
    mounts.make_private()
    staging = mounts.new_filesystem(b"tmpfs", {b"source": b"ipe-emu", b"mode": b"700"})
    mounts.attach(staging, _STAGING)
    os.close(staging)
    session, stage = _STAGING / "session", _STAGING / "volume"
    session.mkdir()
    stage.mkdir()
    SecurityFs(fuse, session).execute()
    fuse_abort.start(ending, session)
    namespaces.unshare(Namespace.MOUNT)  # there it stays mounted, here it does not
    _send_session(channel, fuse, session, user_namespace)
    mounted = [(volume, _mount(channel, volume, session / _IMAGES / volume.name, stage)) for volume in volumes]
    securityfs, keys = (mounts.clone(session / name, recursive=False) for name in (_SECURITY, _KEYS))
    mounts.detach(bytes(_STAGING))
    return Prepared(securityfs, keys, mounted)


def _mount(channel: Channel, volume: PlannedVolume, path: Path, stage: Path) -> "Mounted":
    from ipe_emu.volumes import helper  # noqa: PLC0415 - most runs have no volumes

    image = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return helper.mount(volume.kind, volume.program, image, stage, volume.name)
    except OSError as error:
        channel.send("unmountable", {"why": error.strerror})
        raise
    finally:
        os.close(image)


def _send_session(channel: Channel, fuse: int, mounted_at: Path, user_namespace: int) -> None:
    """Send ``fuse``: the session's descriptor, which is closed here, its root directory, and how it looks from inside.

    ``user_namespace`` is a descriptor of the tree's.
    """
    root = os.open(mounted_at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    seen = {"device": mounts.mount_at(mounted_at).device, "user_namespace": os.fstat(user_namespace).st_ino}
    channel.send("fuse", seen, [fuse, root])
    os.close(fuse)
    os.close(root)
