"""Mounting an image by a program of user space. Runs in the sandbox's agent: single-threaded, root of its namespaces.

The program gets the image as a descriptor, and no other of ours; it is killed when the agent ends. Files belong to the
ids that the image says, seen from the agent's user namespace.
"""

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from attrs import frozen

from ipe_emu.linux import mounts, namespaces, process
from ipe_emu.linux.mounts import Attribute
from ipe_emu.volumes.recognise import Kind

#: What a program may say before nobody listens any more.
_MOST_OUTPUT: Final = 1 << 16
#: How the program sees what it is given.
_IMAGE_FD: Final = 3
_FUSE_FD: Final = 4
_IMAGE: Final = f"/proc/self/fd/{_IMAGE_FD}"
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
_READ_ONLY: Final = Attribute.RDONLY | Attribute.NODEV


@frozen
class Mounted:
    """A detached, read-only mount, and a pidfd of the program that serves it (None if nothing has to)."""

    mount: int
    helper: int | None


def mount(kind: Kind, program: str, image: int, stage: Path, source: str) -> Mounted:
    """Mount the image that descriptor ``image`` is open on; ``program`` is the one of `programs` for its ``kind``.

    ``stage`` is an empty directory of this mount namespace, in use meanwhile; ``source`` is what /proc/mounts is to
    show. OSError with what the program said if it cannot.
    """
    if kind is Kind.SQUASHFS:
        return _squashfuse(program, image, source)
    if kind is Kind.EXT4:
        return _fuse2fs(program, image, stage, source)
    return _extracted(program, image, stage, source)


def _squashfuse(program: str, image: int, source: str) -> Mounted:
    """Mount here, and hand the descriptor that is to be served to the program: libfuse3 takes it as a mount point."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options: dict[bytes, bytes | None] = {
            b"source": source.encode(), b"subtype": b"squashfs", b"fd": b"%d" % fuse, b"rootmode": b"40755",
            b"user_id": b"0", b"group_id": b"0", b"default_permissions": None, b"allow_other": None, b"ro": None,
        }  # fmt: skip
        detached = mounts.new_filesystem(b"fuse", options, _READ_ONLY)
        running = _Program.start([program, "-f", _IMAGE, f"/dev/fd/{_FUSE_FD}"], (image, fuse))
    finally:
        os.close(fuse)
    try:
        os.fstat(detached)  # answered by the program, or it ends and this fails
    except OSError as error:
        os.close(detached)
        raise running.failed(error) from None
    return Mounted(detached, running.let_run())


def _fuse2fs(program: str, image: int, stage: Path, source: str) -> Mounted:
    """Have the program mount: that of Debian 12 is linked with libfuse2, which does not take a descriptor."""
    options = f"ro,allow_other,default_permissions,dev,suid,fsname={source},subtype=ext4"
    with open("/proc/self/mountinfo", "rb") as table:  # noqa: PTH123 - a file to wait at
        table.read()
        changed = select.poll()
        changed.register(table, select.POLLPRI)
        running = _Program.start([program, "-f", "-o", options, _IMAGE, str(stage)], (image,))
        changed.register(running.pidfd, select.POLLIN)
        while True:
            ready = changed.poll()
            if any(fd == running.pidfd for fd, _ in ready):
                raise running.failed(OSError(errno.EINVAL, "it ended"))
            if mounts.is_mounted(stage):
                break
    detached = mounts.clone(stage, recursive=False)
    mounts.detach(bytes(stage))
    try:
        mounts.set_attributes(detached, _READ_ONLY)
        os.fstat(detached)
    except OSError as error:
        os.close(detached)
        raise running.failed(error) from None
    return Mounted(detached, running.let_run())


def _extracted(program: str, image: int, stage: Path, source: str) -> Mounted:
    """Copy all of the image into a new tmpfs, which is read-only from then on."""
    detached = mounts.new_filesystem(b"tmpfs", {b"source": source.encode(), b"mode": b"755"}, Attribute.NODEV)
    mounts.attach(detached, stage)
    try:
        extract(program, image, stage)
        copy = mounts.clone(stage, recursive=False)
    finally:
        mounts.detach(bytes(stage))
        os.close(detached)
    mounts.set_attributes(copy, _READ_ONLY)
    return Mounted(copy, None)


def extract(program: str, image: int, directory: Path) -> None:
    """Copy all files of an erofs image into an empty directory. OSError with what fsck.erofs says if it cannot.

    Files keep their owners where this user namespace has more ids than one, and belong to root else.
    """
    keep = "--preserve-owner" if sum(r.size for r in namespaces.read_map("self", "uid")) > 1 else "--no-preserve-owner"
    arguments = [program, f"--extract={directory}", "--overwrite", "--preserve-perms", keep, _IMAGE]
    running = _Program.start(arguments, (image,), writes_files=True)
    status = running.wait()
    if status:
        raise running.failed(OSError(errno.EIO, f"it ended with status {status}"))
    running.forget()


@frozen
class _Program:
    """A program that runs: its process, and an unnamed file with what it says."""

    name: str
    pid: int
    pidfd: int
    output: int

    @classmethod
    def start(cls, arguments: Sequence[str], fds: Sequence[int], *, writes_files: bool = False) -> "_Program":
        """Start it; it gets ``fds`` as descriptors from 3 up. It may write what it says, and, if so said, files."""
        output = os.memfd_create("output", os.MFD_CLOEXEC)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be(arguments, fds, output, parent, writes_files=writes_files)
        return cls(Path(arguments[0]).name, pid, os.pidfd_open(pid), output)

    def wait(self) -> int:
        """Wait for its end, and return its status as a shell has it."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return 128 - status if status < 0 else status

    def failed(self, error: OSError) -> OSError:
        """End it, and return what went wrong, with what it said."""
        process.send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # waited for already
            self.wait()
        said = os.pread(self.output, _MOST_OUTPUT, 0).decode(errors="replace")
        self.forget()
        words = " ".join(said.split()) or error.strerror
        return OSError(error.errno, f"{self.name}: {words}")

    def let_run(self) -> int:
        """Return its pidfd, with no further interest in what it says."""
        os.close(self.output)
        return self.pidfd

    def forget(self) -> None:
        """Close what is kept of it."""
        os.close(self.pidfd)
        os.close(self.output)


def _be(arguments: Sequence[str], fds: Sequence[int], output: int, parent: int, *, writes_files: bool) -> NoReturn:
    """Be the program. Never returns."""
    try:
        process.die_with_parent()
        if os.getppid() not in {parent, 0}:  # 0: it is in the pid namespace above
            os._exit(1)  # it died before that took effect
        null = os.open(os.devnull, os.O_RDWR)
        _become([null, output, output, *fds])
        if not writes_files:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_OUTPUT, _MOST_OUTPUT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.umask(0o022)
        os.chdir("/")
        os.execve(arguments[0], [*arguments], _ENVIRONMENT)  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(2, f"{arguments[0]}: {error.strerror}".encode())
    finally:
        os._exit(127)


def _become(fds: Sequence[int]) -> None:
    """Make ``fds`` the descriptors from 0 up, and close all others."""
    # Out of the way first: the place of one may be another's.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(fds)) for fd in fds]
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
    process.close_from(len(fds))
