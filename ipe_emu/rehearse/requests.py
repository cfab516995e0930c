"""The supervisor's side of a boot's agent: what it can be asked to mount, and where."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.linux.mounts import Attribute
from ipe_emu.rehearse.staging import DEVTMPFS, VOLUMES
from ipe_emu.volumes.recognise import Kind


@define(eq=False)
class Agent:
    """Asks the agent, from any thread; an errno that it meets becomes a KernelError.

    A mount namespace is given by the process that is in it, and a place in it by an O_PATH descriptor. NotJudgedError
    if the agent is gone, or could not do it for a reason that is no answer of a kernel.
    """

    _requests: Channel
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def stage(self, mount: int, path: Path) -> None:
        """Keep a detached mount in the staging directory, as the original of what `attach` mounts."""
        self._ask("stage", {"path": str(path)}, [mount])

    def bind(self, source: Path, target: Path) -> None:
        """Mount a path of this machine on a staged one; it appears wherever that is mounted in the tree."""
        self._ask("bind", {"source": str(source), "target": str(target)})

    def attach(self, pid: int, target: int, source: Path | int, attributes: Attribute = Attribute.NONE) -> None:
        """Mount a copy of a staged path, with what is mounted on it, or a detached mount, on ``target``."""
        staged = str(source) if isinstance(source, Path) else None
        detached = [source] if isinstance(source, int) else []
        self._ask_in(pid, "attach", {"source": staged, "attributes": int(attributes)}, [target, *detached])

    def compose(
        self, pid: int, target: int, source: Path, parts: Sequence[tuple[Path | None, str]], attributes: Attribute
    ) -> None:
        """Mount a copy of a staged path, and on it ``parts``, which stay there: what, and on which name in it.

        A part that is None makes what is there read-only, if it is there.
        """
        described = [[None if part is None else str(part), name] for part, name in parts]
        values = {"source": str(source), "parts": described, "attributes": int(attributes)}
        self._ask_in(pid, "compose", values, [target])

    def copy(self, pid: int, source: int, target: int) -> None:
        """Mount on ``target`` what ``source`` is on, with all that is mounted there (MS_BIND and MS_REC)."""
        self._ask_in(pid, "copy", {}, [source, target])

    def detach(self, pid: int, root: int) -> None:
        """Unmount the mount whose root is ``root``, with all that is mounted on it and whoever uses it (MNT_DETACH)."""
        self._ask_in(pid, "detach", {}, [root])

    def node(self, pid: int, directory: int, name: bytes, source: Path) -> None:
        """Make a name in a directory and mount a copy of a staged file on it: as mknod(2), where that cannot be."""
        self._ask_in(pid, "node", {"name": os.fsdecode(name), "source": str(source)}, [directory])

    def uncover(self, pid: int, directory: int, name: bytes) -> None:
        """Unmount what `node` mounted on a name in a directory, whoever uses it."""
        self._ask_in(pid, "uncover", {"name": os.fsdecode(name)}, [directory])

    def furnish(self, root: Path, steps: Sequence[Sequence[object]]) -> None:
        """Make directories, files, links and nodes below a staged directory; see `furnishing`.

        NotJudgedError if that fails: no call that a process makes would fail for it.
        """
        try:
            self._ask("furnish", {"root": str(root), "steps": steps})
        except KernelError as error:
            raise NotJudgedError(f"what a device has in /{root.name} cannot be made or removed: {error}") from None

    def mount_image(self, number: int, kind: Kind, program: str, image: int, source: str) -> tuple[Path, int, int]:
        """Mount an image that is open as a staged file system; return where, and its root's st_dev and st_ino.

        ``program`` reads it (`volumes.helper.mount`), ``source`` is what /proc/mounts shows.
        """
        path = VOLUMES / str(number)
        values = {"path": str(path), "kind": kind.value, "program": program, "source": source}
        answer = self._ask("mount-image", values, [image])
        return path, answer["device"], answer["inode"]

    def device(self, name: str, source: Path) -> None:
        """Mount a copy of a staged file, or one of this machine, on a name that the devtmpfs has."""
        self.bind(source, DEVTMPFS / name)

    def uname(self, pid: int) -> tuple[str, str]:
        """Return the name of the node that a process is on (nodename), and the version of this machine's kernel."""
        answer = self._ask_in(pid, "uname", {}, [], kind_of_namespace="uts")
        return answer["node"], answer["version"]

    def _ask_in(
        self, pid: int, kind: str, values: dict[str, Any], fds: Sequence[int], *, kind_of_namespace: str = "mnt"
    ) -> dict[str, Any]:
        namespace = os.open(f"/proc/{pid}/ns/{kind_of_namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._ask(kind, values, [namespace, *fds])
        finally:
            os.close(namespace)

    def _ask(self, kind: str, values: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        with self._lock:
            try:
                self._requests.send(kind, values, fds)
                answer = self._requests.receive()
            except BrokenPipeError:
                answer = None
        if answer is None:
            raise NotJudgedError("the agent of the machine is gone")
        if "not-judged" in answer.values:
            raise NotJudgedError(answer.values["not-judged"])
        if "errno" in answer.values:
            raise KernelError(answer.values["errno"], answer.values["why"])
        return answer.values

    def close(self) -> None:
        """Let the agent end."""
        self._requests.close()
