"""One FUSE session from mount to unmount. pyfuse3 serves one session per process, and so does this module."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection

import pyfuse3
import trio
from attrs import evolve

from ipe_emu.errors import CannotEmulateError
from ipe_emu.ima import ImaPolicy, Observer
from ipe_emu.linux import mounts
from ipe_emu.lsm import Ipe
from ipe_securityfs.operations import MountedAs, Operations
from ipe_securityfs.subtrees import Subtrees
from ipe_securityfs.tree import Owner, Tree, lsm_list

log = logging.getLogger("ipe_emu.securityfs")

#: What /proc/mounts shows. securityfs is mounted nosuid, nodev and noexec everywhere.
_OPTIONS = frozenset({"default_permissions", "fsname=securityfs", "subtype=securityfs"})
_MOUNT_OPTIONS = frozenset({"auto_unmount", "nosuid", "nodev", "noexec"})


class Session:
    """Serves ``ipe`` on ``target``: a directory, or ``/dev/fd/N`` where somebody else has mounted already.

    ``allow_other`` opens the mount to other users, as the kernel's is (mode bits decide); only root may ask for it.
    ``beside_others`` makes the securityfs the directory ``security`` of what is mounted, beside ``subtrees``.
    With ``ima``, who is told what becomes of policies of IMA, there is a node for them.
    """

    def __init__(
        self,
        ipe: Ipe,
        target: str,
        mounted_as: MountedAs,
        *,
        owner: Owner | None = None,
        allow_other: bool = False,
        beside_others: bool = False,
        ima: Observer | None = None,
    ) -> None:
        self._target = target
        self._allow_other = allow_other
        names, known = lsm_list()
        if not known:
            log.info("this machine's /sys/kernel/security/lsm cannot be read; lsm shows %s", names.decode())
        policy = None if ima is None else ImaPolicy(ipe, ima)
        self.tree = Tree(ipe, lsm_list=names, owner=owner, beside_others=beside_others, ima=policy)
        #: None where the securityfs is all there is.
        self.subtrees = Subtrees(self.tree) if beside_others else None
        self._operations = Operations(ipe, self.tree, mounted_as)
        self._own_credentials = mounted_as.credentials
        self._adopted: list[int] = []
        self._lock = threading.Lock()
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def _is_directory(self) -> bool:
        return not self._target.startswith("/dev/fd/")

    def run(self, ready: Callable[[], None] = lambda: None, *, stop_on: Collection[signal.Signals] = ()) -> None:
        """Mount, call ``ready``, serve until the mount is gone or ``stop`` is called, unmount.

        Signals can only be waited for in the main thread. CannotEmulateError if the mount fails; libfuse has then
        said why on stderr.
        """
        options = set(_OPTIONS)
        if self._is_directory:
            options |= _MOUNT_OPTIONS
        if self._allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(self._operations, self._target, options)
        except RuntimeError as error:
            raise CannotEmulateError(f"{self._target}: FUSE cannot be mounted here: {error}") from None
        try:
            if self._is_directory:
                device = mounts.mount_at(os.fsencode(self._target)).device
                self._operations.mounted_as = evolve(self._operations.mounted_as, device=device)
            trio.run(self._serve, ready, stop_on)
        finally:
            pyfuse3.close(unmount=self._is_directory)
            self._operations.close()

    def stop(self) -> None:
        """End ``run``, from any thread; harmless when it has ended."""
        token = self._token
        if token is not None:
            try:
                token.run_sync_soon(pyfuse3.terminate, idempotent=True)
            except trio.RunFinishedError:
                return

    def adopt_user_namespace(self, namespace: int) -> Callable[[], None]:
        """Have the capabilities of one more user namespace count, until the returned function is called."""
        with self._lock:
            self._adopted.append(namespace)
            self._count_namespaces()

        def let_go() -> None:
            with self._lock:
                self._adopted.remove(namespace)
                self._count_namespaces()

        return let_go

    def _count_namespaces(self) -> None:
        counted = evolve(
            self._own_credentials, user_namespaces=self._own_credentials.user_namespaces | {*self._adopted}
        )
        self._operations.mounted_as = evolve(self._operations.mounted_as, credentials=counted)

    async def _serve(self, ready: Callable[[], None], stop_on: Collection[signal.Signals]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            if stop_on:
                nursery.start_soon(self._stop_on_signal, stop_on)
            ready()
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _stop_on_signal(self, signals: Collection[signal.Signals]) -> None:
        with trio.open_signal_receiver(*signals) as received:
            async for number in received:
                log.info("ends: %s", signal.Signals(number).name)
                pyfuse3.terminate()
                return
