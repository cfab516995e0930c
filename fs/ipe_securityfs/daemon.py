"""``ipe-emu mount``: an emulator of its own on a directory, in the background unless told otherwise."""

import contextlib
import json
import logging
import logging.handlers
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

from attrs import evolve, frozen

from ipe_emu.errors import CannotEmulateError, IpeEmuError, UserError
from ipe_emu.event import File, Subject
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux import procfs
from ipe_emu.lsm import Decision, Ipe
from ipe_securityfs.clients import Credentials
from ipe_securityfs.control import Server, held_lock, key_of, make_runtime_directory, sweep
from ipe_securityfs.mount import Session
from ipe_securityfs.operations import MountedAs
from ipe_securityfs.service import AuditTap, Service
from ipe_securityfs.tree import Owner
from ipe_securityfs.unmount import FILE_SYSTEM, detach_dead, mount_on, wait_for_helper

_messages = logging.getLogger("ipe_emu.securityfs")

_HOST_SECURITYFS: Final = "/sys/kernel/security"
_STOP_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOG_SIZE: Final = 1 << 20
_FAILURES: Final[dict[str, type[IpeEmuError]]] = {kind.__name__: kind for kind in (UserError, CannotEmulateError)}


@frozen
class MountOptions:
    """What ``ipe-emu mount`` was asked for.

    ``force`` permits covering the host's own securityfs. ``assume_mac_admin`` gives CAP_MAC_ADMIN to the user who
    mounts; None is yes for a plain user and no for root.
    """

    mountpoint: str
    force: bool = False
    assume_mac_admin: bool | None = None

    @property
    def assumes_mac_admin(self) -> bool:
        """Whether the mounting user is given CAP_MAC_ADMIN on his own mount."""
        return os.geteuid() != 0 if self.assume_mac_admin is None else self.assume_mac_admin


@frozen
class Mounted:
    """A mount that is ready: where, by which process, and where its messages go (None: to stderr).

    ``warnings`` says what will not work on this machine, each with its remedy.
    """

    mountpoint: str
    pid: int
    log: str | None
    assumes_mac_admin: bool
    warnings: tuple[str, ...] = ()


def mount_in_background(ipe: Ipe, facts: FactsSource, options: MountOptions) -> Mounted:
    """Mount, and return when the mount is ready; a process of its own goes on serving it.

    Call before there are threads. That process keeps nothing it was not opened for: no stdin, stdout or stderr, and
    no descriptor that this process inherited. UserError and CannotEmulateError as ``mount_in_foreground`` raises them.
    """
    mountpoint = _checked(options)
    readable, writable = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        os.close(readable)
        _daemon(ipe, facts, options, writable)
    os.close(writable)
    with open(readable, "rb") as stream:  # noqa: PTH123 - a descriptor
        said = stream.read()
    if not said:
        raise CannotEmulateError(f"{mountpoint}: the process that was to serve it died")
    answer = json.loads(said)
    if "error" in answer:
        raise _FAILURES.get(answer["kind"], IpeEmuError)(answer["error"])
    return Mounted(
        answer["mountpoint"], answer["pid"], answer["log"], options.assumes_mac_admin, tuple(answer["warnings"])
    )


def mount_in_foreground(ipe: Ipe, facts: FactsSource, options: MountOptions, ready: Callable[[Mounted], None]) -> None:
    """Mount, call ``ready``, and serve until unmounted or told to end by a signal.

    UserError for a mount point that cannot be one, CannotEmulateError where FUSE does not work.
    """
    with _held_place(_checked(options)) as place:
        _serve(ipe, facts, options, place, ready)


def _checked(options: MountOptions) -> str:
    """Return the mount point without symbolic links; UserError if mounting there would hide the host's own."""
    mountpoint = os.path.realpath(options.mountpoint)
    found = mount_on(mountpoint)
    is_hosts = mountpoint == _HOST_SECURITYFS or (found is not None and found.kind == b"securityfs")
    if is_hosts and not options.force:
        raise UserError(
            f"{mountpoint}: this would hide the host's own securityfs from everyone; `ipe-emu run -- COMMAND` gives"
            " one command an emulated securityfs there and leaves the host alone (--force mounts all the same)"
        )
    return mountpoint


def _check_directory(mountpoint: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):  # noqa: PTH116 - errors as of open(2), without a Path
            raise UserError(f"{mountpoint}: not a directory")
    except FileNotFoundError:
        raise UserError(f"{mountpoint}: no such directory; make it first") from None
    except OSError as error:
        raise UserError(f"{mountpoint}: {error.strerror}") from None
    found = mount_on(mountpoint)
    if found is not None and found.kind == FILE_SYSTEM:
        raise UserError(f"{mountpoint}: an emulator is mounted there already; end it with `ipe-emu umount`")


def _daemon(ipe: Ipe, facts: FactsSource, options: MountOptions, writable: int) -> NoReturn:
    """Be the process in the background; never returns into the program that was forked."""
    status = 1
    try:
        with _telling_failures(writable), _held_place(os.path.realpath(options.mountpoint)) as place:
            log = place.socket.with_suffix(".log")
            _leave_terminal(log, keep=writable)

            def ready(mounted: Mounted) -> None:
                _tell(
                    writable,
                    mountpoint=mounted.mountpoint,
                    pid=mounted.pid,
                    log=mounted.log,
                    warnings=mounted.warnings,
                )

            _serve(ipe, facts, options, evolve(place, log=log), ready)
            log.unlink(missing_ok=True)
        status = 0
    finally:
        # Not sys.exit: what the caller of mount_in_background does next is not this process's business.
        logging.shutdown()
        os._exit(status)


@contextlib.contextmanager
def _telling_failures(writable: int) -> Iterator[None]:
    try:
        yield
    except (UserError, CannotEmulateError) as error:
        _tell(writable, error=str(error), kind=type(error).__name__)
        raise
    except BaseException as error:
        logging.getLogger("ipe_emu").exception("the emulator ends")
        _tell(writable, error=f"the emulator ended: {type(error).__name__}: {error}", kind="")
        raise


def _tell(writable: int, **answer: object) -> None:
    """Say one thing to the process that waits, and let it go on; nobody hears a second one."""
    with contextlib.suppress(OSError):
        os.write(writable, json.dumps(answer).encode())
    with contextlib.suppress(OSError):
        os.close(writable)


def _leave_terminal(log: Path, *, keep: int) -> None:
    """Let go of the terminal and of every descriptor that was inherited; messages go to ``log`` from now on."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    log.unlink(missing_ok=True)
    messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for target, source in ((0, null), (1, null), (2, messages)):
        os.dup2(source, target)  # inheritable: libfuse's helper says on stderr why it cannot mount
    os.close(messages)
    os.close(null)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names alone, without a Path for each
        # What was opened here is marked close-on-exec, as Python does; what is not was inherited, and somebody may be
        # waiting for its end.
        fd = int(name)
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):
                if os.get_inheritable(fd):
                    os.close(fd)
    handler = logging.handlers.RotatingFileHandler(log, maxBytes=_LOG_SIZE, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ipe_emu").addHandler(handler)
    logging.getLogger("ipe_emu").setLevel(logging.INFO)
    logging.getLogger("ipe_emu").propagate = False


@frozen
class _Place:
    mountpoint: str
    socket: Path
    log: Path | None = None


@contextlib.contextmanager
def _held_place(mountpoint: str) -> Iterator[_Place]:
    """Have the place for one emulator alone, with nothing left there by one that died. UserError if it is no place."""
    directory = make_runtime_directory()
    sweep(directory)
    key = key_of(mountpoint)
    with held_lock(directory / f"{key}.lock"):
        wait_for_helper(mountpoint)
        detach_dead(mountpoint)
        _check_directory(mountpoint)
        yield _Place(mountpoint, directory / f"{key}.sock")


def _serve(
    ipe: Ipe, facts: FactsSource, options: MountOptions, place: _Place, ready: Callable[[Mounted], None]
) -> None:
    is_root = os.geteuid() == 0
    assume_for = os.geteuid() if options.assumes_mac_admin else None
    own_namespace = frozenset({procfs.namespace("self", "user")})
    mounted_as = MountedAs(Credentials(own_namespace, assume_for), facts, removable_at=place.mountpoint)
    owner = Owner(os.geteuid(), os.getegid())
    session = Session(ipe, place.mountpoint, mounted_as, owner=owner, allow_other=is_root, ima=_Log())
    log = str(place.log) if place.log else None
    mounted = Mounted(place.mountpoint, os.getpid(), log, options.assumes_mac_admin, tuple(_warnings()))
    service = Service(
        ipe,
        facts,
        AuditTap(ipe),
        {
            "mountpoint": mounted.mountpoint,
            "pid": mounted.pid,
            "log": mounted.log,
            "assumes_mac_admin": mounted.assumes_mac_admin,
        },
        session.stop,
        session.adopt_user_namespace,
    )
    server = Server(place.socket, service.handle)

    def start() -> None:
        server.start()
        ready(mounted)

    try:
        session.run(start, stop_on=_STOP_ON)
    except CannotEmulateError as error:
        raise CannotEmulateError(f"{error}{_said_by_libfuse(place.log)}") from None
    finally:
        server.close()


class _Log:
    """Where a mount says what it cannot judge (``ima.Observer``)."""

    def denied(self, subject: Subject, file: File, decision: Decision) -> None:
        """Nothing: there is an audit record."""

    def not_judged(self, subject: Subject, call: str, reason: str) -> None:
        """Say it."""
        _messages.warning("%s by %r refused: could not be judged: %s", call, subject.comm, reason)

    def not_done(self, subject: Subject, call: str, what: str) -> None:
        """Say it."""
        _messages.warning("%s by %r accepted: %s", call, subject.comm, what)


def _said_by_libfuse(log: Path | None) -> str:
    if log is None:
        return ""
    with contextlib.suppress(OSError):
        if said := " ".join(log.read_text(errors="replace").split()):
            return f" ({said})"
    return ""


def _warnings() -> Iterator[str]:
    """What this process will not be able to see of the processes of its own user."""
    if os.geteuid() == 0:
        return
    try:
        procfs.read(os.getppid(), "syscall")
    except PermissionError:
        yield (
            "how other processes write cannot be seen (kernel.yama.ptrace_scope is not 0), so that every write to the"
            " mount will be refused with EACCES; mount as root, or use `ipe-emu run`"
        )
    except OSError:
        return
