"""H, the agent of a boot: it prepares what the machine mounts, and puts it where the machine wants it.

A single-threaded process in the outer user namespace, with power over the machine's mount namespaces. It forks the
keeper, and then answers the supervisor's requests one by one until that is gone.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from attrs import define

from ipe_emu.errors import NotJudgedError
from ipe_emu.exec_hook import agent, fuse_abort
from ipe_emu.exec_hook.channel import Channel, Message
from ipe_emu.exec_hook.mount_plan import SecurityFs
from ipe_emu.linux import mounts, namespaces, process
from ipe_emu.linux.mounts import Attribute, Propagation
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse import furnishing, keeper
from ipe_emu.rehearse.blueprint import BootBlueprint
from ipe_emu.rehearse.staging import COMPOSED, DIRECTORIES, SESSION, STAGING
from ipe_emu.volumes import helper
from ipe_emu.volumes.recognise import Kind


def main(
    channel: Channel, supervisor: int, ending: int, *, requests: Channel, orders: Channel, blueprint: BootBlueprint
) -> NoReturn:
    """Be the agent, until the supervisor is gone. A failure before the machine is there is the message ``failed``.

    ``ending`` is for `fuse_abort.start`.
    """
    try:
        agent.begin(supervisor)
        namespace = _prepare(channel, ending)
        # Made here, it belongs to the outer user namespace: whatever the machine does, its processes end with it.
        namespaces.unshare(Namespace.PID)
        this = os.pidfd_open(os.getpid())
        if os.fork() == 0:
            requests.close()
            keeper.main(channel, orders, this, blueprint)
        channel.close()
        orders.close()
        os.close(this)
        _Server(requests, namespace, blueprint.root).serve()
    except Exception as error:
        channel.report_failure(error)
    finally:
        os._exit(0)


def _prepare(channel: Channel, ending: int) -> int:
    """Mount the staging directory and the FUSE session in a mount namespace of its own; return a descriptor of it."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    namespaces.unshare(Namespace.MOUNT)
    mounts.make_private()
    mounts.attach_new(b"tmpfs", {b"source": b"ipe-emu", b"mode": b"755"}, Attribute.NONE, STAGING)
    for directory in DIRECTORIES:
        directory.mkdir()
    # From the host's pid namespace, so that requests name their callers as the supervisor knows them.
    SecurityFs(fuse, SESSION).execute()
    fuse_abort.start(ending, SESSION)
    root = os.open(SESSION, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    channel.send("fuse", {"device": mounts.mount_at(SESSION).device}, [fuse, root])
    os.close(fuse)
    os.close(root)
    return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


@define(eq=False)
class _Server:
    """Answers requests.

    ``namespace`` is a descriptor of its own mount namespace, ``machine_root`` the uid and gid of the machine's root.
    """

    requests: Channel
    namespace: int
    machine_root: int
    composed: int = 0

    def serve(self) -> None:
        """Answer until nobody is there to ask."""
        kinds: Mapping[str, Callable[[dict[str, Any], list[int]], dict[str, Any] | None]] = {
            "stage": self.stage,
            "bind": self.bind,
            "attach": self.attach,
            "compose": self.compose,
            "copy": self.copy,
            "uname": self.uname,
            "detach": self.detach,
            "node": self.node,
            "uncover": self.uncover,
            "furnish": self.furnish,
            "mount-image": self.mount_image,
        }
        while (message := self.requests.receive()) is not None:
            try:
                answer = kinds[message.kind](message.values, message.fds) or {}
            except NotJudgedError as error:
                answer = {"not-judged": str(error)}
            except OSError as error:
                answer = {"errno": error.errno or errno.EIO, "why": str(error)}
            except Exception as error:  # whatever a tree brings about here, the rehearsal must hear of it
                answer = {"not-judged": f"the agent failed: {message.kind}: {type(error).__name__}: {error}"}
            finally:
                _close(message)
            self.requests.send("answer", answer)

    def stage(self, values: dict[str, Any], fds: list[int]) -> None:
        """Mount a detached mount in the staging directory; what is mounted on it later appears on its copies too."""
        mounts.attach(fds[0], Path(values["path"]))
        mounts.set_attributes(Path(values["path"]), Attribute.NONE, propagation=Propagation.SHARED)

    def bind(self, values: dict[str, Any], _fds: list[int]) -> None:
        """Mount a copy of a mount of this namespace, or of a part of it, on another path."""
        self._with_copy(Path(values["source"]), False, lambda tree: mounts.attach(tree, Path(values["target"])))

    def compose(self, values: dict[str, Any], fds: list[int]) -> None:
        """Attach a copy of the staged ``source``, and on it the ``parts``: what is mounted, and on which name in it.

        A part without a source is mounted on itself, read-only. The machine cannot take a part away, not even where its
        root is root of this machine: whatever spreads from a more privileged namespace is locked (``lock_mnt_tree()``).
        """
        self.composed += 1
        original = COMPOSED / str(self.composed)
        original.mkdir()
        self._with_copy(Path(values["source"]), False, lambda tree: mounts.attach(tree, original))
        # A group of its own, or the parts would spread to every other copy as well.
        mounts.set_attributes(original, Attribute.NONE, propagation=Propagation.PRIVATE)
        mounts.set_attributes(original, Attribute.NONE, propagation=Propagation.SHARED)
        self.attach({**values, "source": str(original)}, fds)
        for source, name in values["parts"]:
            target = original / name
            if source is not None:
                self.bind({"source": source, "target": str(target)}, [])
            elif target.exists():
                tree = mounts.clone(target, recursive=False)
                try:
                    mounts.set_attributes(tree, Attribute.RDONLY)
                    mounts.attach(tree, target)
                finally:
                    os.close(tree)

    def uname(self, _values: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Return the name of the node, and the version, in the UTS namespace ``fds[0]``."""
        own = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.enter(fds[0], Namespace.UTS)
            try:
                found = os.uname()
            finally:
                namespaces.enter(own, Namespace.UTS)
        finally:
            os.close(own)
        return {"node": found.nodename, "version": found.version}

    def copy(self, _values: dict[str, Any], fds: list[int]) -> None:
        """In the namespace ``fds[0]``, mount on ``fds[2]`` what ``fds[1]`` is on, with all that is mounted there."""
        with self._in(fds[0]):
            tree = mounts.clone_at(fds[1], recursive=True)
            try:
                mounts.attach_at(tree, fds[2])
            finally:
                os.close(tree)

    def attach(self, values: dict[str, Any], fds: list[int]) -> None:
        """In the namespace ``fds[0]``, mount on ``fds[1]`` a copy of what is staged, or the detached ``fds[2]``."""

        def attach_there(tree: int) -> None:
            # Where it is staged, more may be mounted on it later; not the other way round.
            mounts.set_attributes(tree, Attribute(values["attributes"]), propagation=Propagation.SLAVE)
            with self._in(fds[0]):
                mounts.attach_at(tree, fds[1])

        if values["source"] is None:
            attach_there(fds[2])
        else:
            self._with_copy(Path(values["source"]), True, attach_there)

    def detach(self, _values: dict[str, Any], fds: list[int]) -> None:
        """Unmount, in the namespace ``fds[0]``, the mount whose root ``fds[1]`` is, with all that is mounted on it."""
        with self._in(fds[0]):
            os.fchdir(fds[1])
            mounts.detach(b".")

    def node(self, values: dict[str, Any], fds: list[int]) -> None:
        """In the namespace ``fds[0]``, have a name in the directory ``fds[1]`` lead to a copy of what is staged."""
        name = os.fsencode(values["name"])
        with self._as_machine_root():
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fds[1]))

        tree = furnishing.copy_of_node(Path(values["source"]))
        try:
            with self._in(fds[0]):
                target = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fds[1])
                try:
                    mounts.attach_at(tree, target)
                finally:
                    os.close(target)
        finally:
            os.close(tree)

    def uncover(self, values: dict[str, Any], fds: list[int]) -> None:
        """Unmount, in the namespace ``fds[0]``, what is mounted on a name in the directory ``fds[1]``."""
        with self._in(fds[0]):
            os.fchdir(fds[1])
            mounts.detach(os.fsencode(values["name"]))

    def furnish(self, values: dict[str, Any], _fds: list[int]) -> None:
        """Make what devices have in the staged devtmpfs or sysfs."""
        furnishing.furnish(Path(values["root"]), values["steps"], self._as_machine_root)

    def mount_image(self, values: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Mount the image ``fds[0]`` on a new staged directory; return the numbers of its device and its root."""
        place = Path(values["path"])
        place.mkdir()
        mounted = helper.mount(Kind(values["kind"]), values["program"], fds[0], place, values["source"])
        if mounted.helper is not None:
            os.close(mounted.helper)  # it ends with this process
        try:
            mounts.attach(mounted.mount, place)
            root = os.fstat(mounted.mount)
            return {"device": root.st_dev, "inode": root.st_ino}
        finally:
            os.close(mounted.mount)

    def _with_copy(self, source: Path, recursive: bool, use: Callable[[int], None]) -> None:
        tree = mounts.clone(source, recursive=recursive)
        try:
            use(tree)
        finally:
            os.close(tree)

    @contextmanager
    def _in(self, namespace: int) -> Iterator[None]:
        namespaces.enter(namespace, Namespace.MOUNT)
        try:
            yield
        finally:
            # Back at its root as well: a working directory elsewhere would keep a mount busy.
            namespaces.enter(self.namespace, Namespace.MOUNT)

    @contextmanager
    def _as_machine_root(self) -> Iterator[None]:
        os.setegid(self.machine_root)
        os.seteuid(self.machine_root)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            process.die_with_parent()  # forgotten with every change of ids


def _close(message: Message) -> None:
    for fd in message.fds:
        os.close(fd)
