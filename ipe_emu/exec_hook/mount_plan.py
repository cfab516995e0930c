"""What is mounted in the sandbox, planned as objects: ``describe()`` says it, ``execute()`` does it.

The host's tree stays visible as it is; the steps put things over it. They are executed by the agent in a mount
namespace that belongs to the *outer* user namespace: in the copy that the rehearsed tree gets, the kernel locks what
they did (``lock_mnt_tree()``), so that not even its root can unmount or remount it.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from attrs import frozen

from ipe_emu.errors import CannotEmulateError
from ipe_emu.linux import mounts, procfs, statx
from ipe_emu.linux.mounts import Attribute, MountInfo

SECURITYFS: Final = Path("/sys/kernel/security")
_DEV: Final = Path("/dev")
_PROC: Final = Path("/proc")
_SYS: Final = Path("/sys")

#: What every system has in /dev, and nobody can do harm with.
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
#: Directories below /dev that hold no devices of the machine.
_DEVICE_DIRECTORIES: Final = ("pts", "shm", "mqueue")
_DEVICE_LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


class Step(Protocol):
    """One thing to do to the mount namespace."""

    def describe(self) -> str:
        """Return what the step does, in words."""

    def execute(self) -> None:
        """Do it. OSError if the kernel refuses."""


@frozen
class MakePrivate:
    """Keep the host's mounts and the sandbox's apart from here on."""

    def describe(self) -> str:
        """Return what the step does, in words."""
        return "make every mount private"

    def execute(self) -> None:
        """Do it."""
        mounts.make_private()


@frozen
class ReadOnly:
    """Mount a directory or file over itself, read-only. What is mounted below a directory stays as it is."""

    path: Path

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"bind {shown(self.path)} over itself, read-only"

    def execute(self) -> None:
        """Do it."""
        # Recursive: the mounts below may be locked together with it (`mounts.clone`).
        tree = mounts.clone(self.path, recursive=True)
        try:
            mounts.set_attributes(tree, Attribute.RDONLY)
            mounts.attach(tree, self.path)
        finally:
            os.close(tree)


@frozen
class Conceal:
    """Put an empty directory that nobody can enter over one that the tree must not reach."""

    path: Path

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"conceal {shown(self.path)}"

    def execute(self) -> None:
        """Do it."""
        mounts.attach_new(b"tmpfs", {b"source": b"ipe-emu", b"mode": b"0"}, Attribute.RDONLY, self.path)


@frozen
class Bind:
    """Show a directory at another place as well, with what is mounted below it."""

    source: Path
    target: Path

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"bind {shown(self.source)} to {shown(self.target)}"

    def execute(self) -> None:
        """Do it."""
        tree = mounts.clone(self.source, recursive=True)
        try:
            mounts.attach(tree, self.target)
        finally:
            os.close(tree)


@frozen
class MakeDirectory:
    """Have a directory exist below one in which none can be made, as in sysfs.

    The deepest directory that exists is covered by a tmpfs that shows everything it holds, and the missing one.
    """

    path: Path

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"cover {shown(self._existing())} by a copy that has {shown(self.path)}"

    def _existing(self) -> Path:
        return next(parent for parent in self.path.parents if parent.is_dir())

    def execute(self) -> None:
        """Do it."""
        covered = self._existing()
        kept = [_Kept.of(entry) for entry in sorted(covered.iterdir())]
        mounts.attach_new(
            b"tmpfs",
            {b"source": b"ipe-emu", b"mode": b"755"},
            Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC,
            covered,
        )
        for entry in kept:
            entry.restore()
        self.path.mkdir(mode=0o755, parents=True)
        mounts.set_attributes(covered, Attribute.RDONLY)


@frozen
class ReadOnlyTree:
    """Make a mount and everything mounted below it read-only."""

    path: Path

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"make {shown(self.path)} and all below it read-only"

    def execute(self) -> None:
        """Do it."""
        mounts.set_attributes(self.path, Attribute.RDONLY, recursive=True)


@frozen
class Shift:
    """Rebuild the mount tree from copies whose files belong to the ids of another user namespace.

    What cannot be shifted (proc, sysfs, most network file systems) stays as it is: nobody's inside, and open as far as
    it is to everybody. So does /dev, or the disks would be the tree's; and no other mount may hold devices.
    """

    user_namespace: int

    def describe(self) -> str:
        """Return what the step does, in words."""
        return "give the tree's ids to the files of every mount that allows it, but /dev; no devices on these"

    def execute(self) -> None:
        """Do it."""
        copies = [(mount.path, mounts.clone(Path(os.fsdecode(mount.path)), recursive=False)) for mount in _visible()]
        for path, tree in copies:
            if _holds_devices(path):
                continue
            try:
                mounts.set_attributes(tree, Attribute.IDMAP | Attribute.NODEV, user_namespace=self.user_namespace)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
        (_, root), *others = copies
        here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        # Any directory will do: it is not seen again.
        mounts.attach(root, _PROC)
        mounts.pivot_root_into(_PROC)
        for path, tree in others:
            mounts.attach(tree, Path(os.fsdecode(path)))
        os.fchdir(here)  # if it was removed, nothing else leads there
        for _, tree in copies:
            os.close(tree)
        os.close(here)


def _holds_devices(path: bytes) -> bool:
    return (path == b"/dev" or path.startswith(b"/dev/")) and path != b"/dev/shm"


def _visible() -> Iterator[MountInfo]:
    """The mounts that a path leads to, parents first; not those that another one covers."""
    for mount in mounts.mounts():
        try:
            fd = os.open(mount.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if statx.mount_id(fd) == mount.id:
                yield mount
        finally:
            os.close(fd)


@frozen
class HarmlessDevices:
    """Let no mount hold devices any more, and cover /dev by one with the devices that every program may use.

    For a tree whose root is the machine's root as far as file permissions go: it owns the disks.
    """

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"no devices on any mount, and in /dev only {', '.join(_DEVICES)}"

    def execute(self) -> None:
        """Do it."""
        names = [*_DEVICES, *_DEVICE_DIRECTORIES]
        kept = [_Kept.of(_DEV / name) for name in names if (_DEV / name).exists()]
        mounts.set_attributes(Path("/"), Attribute.NODEV, recursive=True)
        mounts.attach_new(b"tmpfs", {b"source": b"ipe-emu", b"mode": b"755"}, Attribute.NOSUID | Attribute.NOEXEC, _DEV)
        for entry in kept:
            entry.restore()
        for name, target in _DEVICE_LINKS.items():
            (_DEV / name).symlink_to(target)


@frozen
class Proc:
    """A /proc of the sandbox's own pid namespace, over the host's."""

    read_only_controls: bool

    def describe(self) -> str:
        """Return what the step does, in words."""
        controls = ", its controls read-only" if self.read_only_controls else ""
        return f"mount a /proc of the sandbox's own processes{controls}"

    def execute(self) -> None:
        """Do it."""
        proc = new_proc()
        try:
            mounts.attach(proc, _PROC)
        finally:
            os.close(proc)
        if self.read_only_controls:
            for name in procfs.CONTROLS:
                if (_PROC / name).exists():
                    ReadOnly(_PROC / name).execute()


def new_proc() -> int:
    """Return a detached mount of this process's pid namespace's /proc; OSError where the kernel refuses it."""
    try:
        return mounts.new_filesystem(
            b"proc", {b"source": b"proc"}, Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC
        )
    except PermissionError as error:
        # The answer of the kernel's mount_too_revealing().
        why = "something covers parts of this machine's /proc, as container engines do"
        raise PermissionError(error.errno, f"{error.strerror} ({why})") from None


def cover_keys(mount: int) -> list[int]:
    """Attach a detached mount over /proc/keys; return a descriptor of what is covered, as this process sees it.

    Which keys it shows goes by who opened it (``proc_keys_show()``). None where this kernel has no such file.
    """
    try:
        covered = os.open(_PROC / "keys", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    mounts.attach(mount, _PROC / "keys")
    os.close(mount)
    return [covered]


@frozen
class SecurityFs:
    """The emulated securityfs, over the kernel's. ``fuse`` is the descriptor that its server reads."""

    fuse: int
    path: Path = SECURITYFS

    def describe(self) -> str:
        """Return what the step does, in words."""
        return f"mount the emulated securityfs on {shown(self.path)}"

    def execute(self) -> None:
        """Do it."""
        options: dict[bytes, bytes | None] = {
            b"source": b"securityfs",
            b"subtype": b"securityfs",
            b"fd": b"%d" % self.fuse,
            b"rootmode": b"40755",
            b"user_id": b"0",
            b"group_id": b"0",
            b"default_permissions": None,
            b"allow_other": None,
        }
        mounts.attach_new(b"fuse", options, Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC, self.path)


@frozen
class Wanted:
    """What the rehearsal asks of the mount namespace.

    ``verity`` are directories that become mounts of their own, read-only; ``read_only`` are files that the tree may
    read and not write; ``concealed`` are directories it must not reach; ``securityfs`` is a mounted emulator to show,
    or None for one of its own. ``shift`` is a descriptor of the user namespace whose ids the files are to have;
    ``shield`` keeps from the tree what its root owns, being the machine's root for file permissions (`footing.Kind`).
    """

    verity: Sequence[Path] = ()
    read_only: Sequence[Path] = ()
    concealed: Sequence[Path] = ()
    securityfs: Path | None = None
    shift: int | None = None
    shield: bool = False


def plan(wanted: Wanted) -> tuple[Step, ...]:
    """Return the steps, in order, that the agent takes before the tree's user namespace exists.

    CannotEmulateError where the root directory has no /sys.
    """
    if not _SYS.is_dir():
        raise CannotEmulateError("this machine has no directory /sys to show the emulated securityfs in")
    steps: list[Step] = [MakePrivate()]
    if wanted.shift is not None:
        steps.append(Shift(wanted.shift))
    if wanted.shield or (wanted.shift is not None and not _DEV.is_mount()):
        steps.append(HarmlessDevices())
    if wanted.shield and _SYS.is_mount():
        steps.append(ReadOnlyTree(_SYS))
    if not SECURITYFS.is_dir():
        steps.append(MakeDirectory(SECURITYFS))
    # Outer directories first: a mount below stays visible in the recursive copy of one above.
    steps += [ReadOnly(path) for path in sorted(wanted.verity)]
    if wanted.securityfs is not None:
        steps.append(Bind(wanted.securityfs, SECURITYFS))
    steps += [ReadOnly(path) for path in wanted.read_only]
    steps += [Conceal(path) for path in wanted.concealed]
    return tuple(steps)


def shown(path: Path | str) -> str:
    """Return a path for people: what is not printable is escaped."""
    return repr(str(path))[1:-1]


@frozen
class _Kept:
    """Something below a directory that is about to be covered: a symlink's target, or a copy of a mount."""

    path: Path
    link: str | None
    tree: int | None
    directory: bool

    @classmethod
    def of(cls, path: Path) -> "_Kept":
        if path.is_symlink():
            return cls(path, str(path.readlink()), None, directory=False)
        return cls(path, None, mounts.clone(path, recursive=True), directory=path.is_dir())

    def restore(self) -> None:
        if self.link is not None:
            self.path.symlink_to(self.link)
        if self.tree is not None:
            if self.directory:
                self.path.mkdir(0o755)
            else:
                self.path.touch(0o644)
            mounts.attach(self.tree, self.path)
            os.close(self.tree)
