"""What this machine and this user can do, found out by trying it; and for what they cannot, the exact remedy."""

import errno
import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.linux import capabilities, mounts, namespaces, syscalls
from ipe_emu.linux.capabilities import Capability
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.namespaces import IdMap, IdRange, Namespace


@frozen
class Probe:
    """One thing that was tried.

    ``needed_for`` are the commands that need it (``run``, ``mount``); with none it only makes more possible.
    ``remedy`` is what to type, or to do; empty if ``ok``.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed_for: tuple[str, ...] = ()


def probe() -> list[Probe]:
    """Try everything. Leaves nothing behind: what changes this process is tried in children."""
    return [
        architecture(),
        fuse(),
        fusermount(),
        user_namespaces(),
        own_proc(),
        seccomp(),
        mount_calls(),
        subordinate(),
    ]


def architecture() -> Probe:
    """Whether the numbers of system calls are known."""
    needed = ("run",)
    if not syscalls.NUMBERS:
        return Probe(
            "architecture", False, f"{syscalls.MACHINE} is not known here", "use an x86_64 or aarch64 machine", needed
        )
    tested = "" if syscalls.MACHINE == "x86_64" else " (has a table of system calls, but is not tested)"
    return Probe("architecture", True, syscalls.MACHINE + tested, needed_for=needed)


def fuse() -> Probe:
    """Whether /dev/fuse can be opened."""
    needed = ("mount", "run")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = {
            errno.ENOENT: "sudo modprobe fuse (in a container: start it with --device /dev/fuse)",
            errno.ENODEV: "sudo modprobe fuse",
            errno.ENXIO: "sudo modprobe fuse",
            errno.EACCES: "sudo chmod 666 /dev/fuse; for good: "
            """echo 'KERNEL=="fuse", MODE="0666"' | sudo tee /etc/udev/rules.d/99-fuse.rules""",
            errno.EPERM: "start the container with --device /dev/fuse",
        }.get(error.errno or 0, "sudo modprobe fuse")
        return Probe("/dev/fuse", False, f"cannot be opened: {error.strerror}", remedy, needed)
    return Probe("/dev/fuse", True, "can be opened", needed_for=needed)


def fusermount() -> Probe:
    """Whether fusermount3 is there, which mounts for plain users and unmounts after a crash."""
    found = shutil.which("fusermount3")
    if found is None:
        return Probe("fusermount3", False, "not installed", "sudo apt-get install fuse3", ("mount",))
    if not Path("/etc/mtab").exists():
        # Only fusermount3 reads it; a system that was never booted, such as a minimal chroot, has none.
        remedy = "sudo ln -s /proc/self/mounts /etc/mtab"
        return Probe("fusermount3", False, "it cannot unmount without /etc/mtab", remedy, ("mount",))
    return Probe("fusermount3", True, found, needed_for=("mount",))


_NO_USER_NAMESPACE: Final = "no user namespace can be made"


def user_namespaces() -> Probe:
    """Whether a user namespace can be made, and gives the power to mount."""
    needed = ("run",)
    failure = _in_child(_mount_in_user_namespace)
    if failure is None:
        return Probe("user namespaces", True, "can be made, and mounted in", needed_for=needed)
    for file, forbids, name, value in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns", "0"),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone", "1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces", "15000"),
        ("user/max_mnt_namespaces", "0", "user.max_mnt_namespaces", "15000"),
    ):
        if _sysctl(file) == forbids:
            remedy = (
                f"sudo sysctl -w {name}={value}; for good: echo {name}={value} | sudo tee /etc/sysctl.d/99-ipe.conf"
            )
            return Probe("user namespaces", False, f"{name} is {forbids} ({failure})", remedy, needed)
    remedy = "in a container: start it with --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    return Probe("user namespaces", False, failure, remedy, needed)


def own_proc() -> Probe:
    """Whether a pid namespace can have a /proc of its own."""
    needed = ("run",)
    failure = _in_child(_mount_proc)
    if failure is None:
        return Probe("/proc", True, "a pid namespace can have its own", needed_for=needed)
    if failure.startswith(_NO_USER_NAMESPACE):
        return Probe("/proc", False, failure, "make user namespaces work first (above)", needed)
    remedy = "in a container: start it with --security-opt systempaths=unconfined (something covers parts of /proc)"
    return Probe("/proc", False, failure, remedy, needed)


_SECCOMP_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 1 << 3
_WAIT_KILLABLE_RECV: Final = 1 << 5


def seccomp() -> Probe:
    """Whether system calls can be handed to a supervisor (Linux 5.19)."""
    needed = ("run",)
    try:
        # Without a filter it cannot succeed; flags that are not known are noticed first.
        syscalls.call("seccomp", _SECCOMP_SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE_RECV, None)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return Probe("seccomp notification", True, "supported", needed_for=needed)
        remedy = "use Linux 5.19 or newer; in a container: --security-opt seccomp=unconfined"
        return Probe("seccomp notification", False, f"not supported: {error.strerror}", remedy, needed)
    except NotImplementedError as error:
        return Probe("seccomp notification", False, str(error), "use an x86_64 or aarch64 machine", needed)
    raise AssertionError("seccomp(2) installed a filter out of nothing")


def mount_calls() -> Probe:
    """Whether mounts can be cloned and given attributes (Linux 5.12)."""
    needed = ("run",)
    try:
        syscalls.call("mount_setattr", -1, b"", 0, None, 0)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            return Probe("mount_setattr", True, "supported", needed_for=needed)
        remedy = "use Linux 5.12 or newer; in a container: --security-opt seccomp=unconfined"
        return Probe("mount_setattr", False, f"not supported: {error.strerror}", remedy, needed)
    except NotImplementedError as error:
        return Probe("mount_setattr", False, str(error), "use an x86_64 or aarch64 machine", needed)
    raise AssertionError("mount_setattr(2) accepted nothing at all")


def subordinate() -> Probe:
    """Whether a plain user has more than one user id in a sandbox; chown(1) and su(1) inside need it."""
    name = "subordinate ids"
    if capabilities.has(Capability.SYS_ADMIN):
        return Probe(name, True, "not needed: this user has every id")
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        return Probe(name, False, f"user {uid} has no name", "give the user an entry in /etc/passwd")
    if shutil.which("newuidmap") is None:
        return Probe(name, False, "newuidmap is not installed", "sudo apt-get install uidmap")
    missing = [f for f in ("/etc/subuid", "/etc/subgid") if not namespaces.subordinate_ids(Path(f), (user, str(uid)))]
    if missing:
        remedy = f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
        return Probe(name, False, f"{' and '.join(missing)} grant {user} none", remedy)
    return Probe(name, True, "granted")


def _in_child(attempt: Callable[[], None]) -> str | None:
    """Try something in a child; None if it worked, or else why not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            attempt()
        except OSError as error:
            os.write(writer, f"{error.strerror}".encode())
        except BaseException as error:  # the child must not go on as a second parent
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said.decode(errors="replace") or None


def _mount_in_user_namespace() -> None:
    _enter(Namespace.USER | Namespace.MOUNT)
    tmpfs = mounts.new_filesystem(b"tmpfs", {})
    mounts.set_attributes(tmpfs, Attribute.NODEV)
    mounts.attach(tmpfs, Path("/proc"))


def _mount_proc() -> None:
    _enter(Namespace.USER | Namespace.MOUNT | Namespace.PID)
    child = os.fork()
    if child == 0:
        try:
            mounts.new_filesystem(b"proc", {})
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, f"a /proc cannot be mounted: {os.strerror(number)}")


def _enter(kinds: Namespace) -> None:
    uid, gid = os.getuid(), os.getgid()
    try:
        namespaces.unshare(kinds)
        namespaces.write_maps("self", IdMap((IdRange(0, uid, 1),), (IdRange(0, gid, 1),), setgroups=False))
    except OSError as error:
        raise OSError(error.errno, f"{_NO_USER_NAMESPACE}: {error.strerror}") from None
    if not capabilities.has(Capability.SYS_ADMIN):
        raise OSError(errno.EPERM, f"{_NO_USER_NAMESPACE} that gives privileges")
    mounts.make_private()


def _sysctl(name: str) -> str | None:
    try:
        return (Path("/proc/sys") / name).read_text().strip()
    except OSError:
        return None
