"""The two threads that answer the rehearsed tree: one for the filter's notifications, one for the securityfs.

They are apart because answering a notification resolves paths, which may go through the securityfs.
"""

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from attrs import field, frozen

from ipe_emu.exec_hook.hook import ExecHook, Observer
from ipe_emu.exec_hook.ima import Reported
from ipe_emu.exec_hook.sandbox import Fuse, Surroundings
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux.mountinfo import Superblocks
from ipe_emu.linux.seccomp import Listener, Notification
from ipe_emu.lsm import Ipe

if TYPE_CHECKING:
    from ipe_securityfs.mount import Session
    from ipe_securityfs.subtrees import Content

#: How long a thread may keep the interpreter to itself (seconds; Python's default is 5 ms). While one thread is at
#: work, a system call waits this long for the other one's answer. Not while both import: that only takes longer.
_SWITCH_INTERVAL = 0.0002
#: How many objects may be made before the collector looks for cycles (Python's default is 700). An answer makes
#: hundreds, hardly any of them in a cycle, and the tree waits while the collector looks.
_COLLECT_AFTER = 50_000
#: How long the securityfs may take to end once its last user is gone, in seconds.
_TIME_TO_END = 10.0


class Failures(Protocol):
    """Who is told, from any thread, that a part of the emulator failed."""

    def failed(self, what: str) -> None:
        """Note it: nothing that was answered since counts."""


class _Thread:
    """A thread whose failure ends the rehearsal: it is reported, and ``on_failure`` called."""

    def __init__(self, name: str, work: Callable[[], None], report: Failures, on_failure: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._report = report
        self._on_failure = on_failure
        # A daemon: it must not keep a supervisor alive that has to give up.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # whatever it is: without this thread the tree would hang
            self._report.failed(f"{self._name}: {type(error).__name__}: {error}")
            self._on_failure()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(_TIME_TO_END)
        if self._thread.is_alive():
            self._report.failed(f"{self._name}: does not end")


class Answering:
    """An exec hook that several threads may ask, each for a filter of its own: one after the other."""

    def __init__(self, hook: ExecHook) -> None:
        self._hook = hook
        self._lock = threading.Lock()

    def answer(self, listener: Listener, notification: Notification) -> None:
        """Judge one call and answer it."""
        with self._lock:
            self._hook.answer(listener, notification)


class Notifications(_Thread):
    """Answers the filter's notifications until no process is left under it."""

    def __init__(
        self, hook: "ExecHook | Answering", listener: Listener, report: Failures, on_failure: Callable[[], None]
    ) -> None:
        self._hook = hook
        self._listener = listener
        super().__init__("answering system calls", self._answer, report, on_failure)

    def _answer(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL)
        gc.freeze()  # what was made until now stays until the end, and need not be looked at again
        gc.set_threshold(_COLLECT_AFTER)
        try:
            while (notification := self._listener.receive()) is not None:
                self._hook.answer(self._listener, notification)
        finally:
            self._listener.close()


@frozen
class Served:
    """What the securityfs of a sandbox shows and goes by; ``images`` and ``texts`` come beside it, by their names."""

    ipe: Ipe
    facts: FactsSource
    surroundings: Surroundings
    superblocks: Superblocks
    images: "Mapping[str, Content]"
    observer: Observer
    texts: Mapping[str, Callable[[], bytes]] = field(factory=dict)


class SecurityFsServer(_Thread):
    """Serves the emulated securityfs, which the sandbox has mounted already.

    It starts with importing what that takes (150 ms), while the sandbox is being made; requests wait meanwhile.
    """

    def __init__(self, report: Failures, on_failure: Callable[[], None]) -> None:
        self._told = threading.Event()
        self._wanted: Callable[[], Session] | None = None
        self._root: int | None = None
        super().__init__("serving the securityfs", self._serve, report, on_failure)

    def serve(self, fuse: Fuse, served: Served) -> None:
        """Tell what to serve, and where (`Sandbox.fuse`)."""
        self.serve_session(fuse.root, functools.partial(_session, fuse, served))

    def serve_session(self, root: int, make_session: "Callable[[], Session]") -> None:
        """Tell what to serve; ``root`` is a descriptor of the mount's root, which is closed by ``stop``.

        ``make_session`` is called in the thread that serves.
        """
        self._root = root
        self._wanted = make_session
        self._told.set()

    def stop(self) -> None:
        """Let go of the mount, once the sandbox has: that ends the session, or the one that is about to begin."""
        if self._root is not None:
            os.close(self._root)
            self._root = None
        self._told.set()

    def _serve(self) -> None:
        import ipe_securityfs.mount  # noqa: F401, PLC0415 - the slow import, while others work

        self._told.wait()
        if self._wanted is not None:
            self._wanted().run()


def _session(fuse: Fuse, served: Served) -> "Session":
    from ipe_securityfs.clients import Credentials  # noqa: PLC0415 - as above
    from ipe_securityfs.mount import Session  # noqa: PLC0415 - as above
    from ipe_securityfs.operations import MountedAs  # noqa: PLC0415 - as above
    from ipe_securityfs.tree import SECURITY, Owner  # noqa: PLC0415 - as above

    surroundings = served.surroundings
    beside_others = bool(served.images or served.texts)
    below = f"/{SECURITY.decode()}" if beside_others else ""
    mounted_as = MountedAs(
        Credentials(frozenset({surroundings.user_namespace}), root=surroundings.root),
        served.facts,
        removable_at=f"/proc/self/fd/{fuse.root}{below}",
        device=surroundings.securityfs_device,
        superblocks=served.superblocks,
        pid_level=1,  # the sandbox's own pid namespace
        size_trick=False,  # the exec hook answers sendfile(2)
    )
    owner = Owner(surroundings.root, surroundings.root)
    target = f"/dev/fd/{fuse.descriptor}"
    session = Session(
        served.ipe, target, mounted_as, owner=owner, beside_others=beside_others, ima=Reported(served.observer)
    )
    for name, content in served.images.items():
        assert session.subtrees is not None  # noqa: S101 - it has others beside it
        session.subtrees.add_image(name.encode(), content)
    for name, text in served.texts.items():
        assert session.subtrees is not None  # noqa: S101 - likewise
        session.subtrees.add_text(name.encode(), text)
    return session
