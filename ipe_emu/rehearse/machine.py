"""C, the machine's first process: makes its root file system, and becomes its init process as the kernel's does.

Source: ``kernel_init()`` and ``run_init_process()`` in init/main.c; ``console_on_rootfs()``.
"""

import errno
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from ipe_emu.errors import NotJudgedError
from ipe_emu.exec_hook.blueprint import IGNORED_SIGNALS
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.exec_hook.init import install_filter
from ipe_emu.exec_hook.mount_plan import new_proc
from ipe_emu.linux import mounts, namespaces, process, procfs, uevents
from ipe_emu.linux.mounts import Attribute
from ipe_emu.linux.namespaces import Namespace
from ipe_emu.rehearse.blueprint import BootBlueprint
from ipe_emu.rehearse.image.rootfs import Unpacked, unpack
from ipe_emu.rehearse.init_arguments import LAST_RESORTS, InitArguments
from ipe_emu.rehearse.staging import ROOT
from ipe_emu.rehearse.words import shown

#: Files in the devtmpfs that wait for a device to be mounted on them; and links (``devtmpfs_init()`` makes none: these
#: are udev's, and what an initramfs without one expects all the same).
DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "console", "kmsg")
_DEVICE_LINKS: Final = {"ptmx": "pts/ptmx"}
_DEVICE_DIRECTORIES: Final = ("mapper",)
#: Directories that programs look for below /sys.
_SYSFS: Final = (
    "block", "bus", "class/block", "dev/block", "dev/char", "devices", "firmware", "fs/cgroup", "kernel/security",
    "kernel/debug", "kernel/tracing", "kernel/config", "fs/bpf", "fs/pstore", "fs/fuse/connections", "module", "power",
)  # fmt: skip

#: Remarks about an image that are passed on.
_MOST_REMARKS: Final = 50


def main(channel: Channel, blueprint: BootBlueprint) -> NoReturn:
    """Be the machine's first process.

    Sends ``machine`` with a socket for uevents and the devtmpfs, sysfs, proc and root to be staged, then ``listener``;
    then lines of the kernel's log as ``log``, and ``panic`` where there is no init process.
    """
    try:
        process.set_name(b"ipe-emu machine")
        process.die_with_parent()
        process.set_dumpable(True)
        os.umask(0)
        namespaces.unshare(Namespace.MOUNT | Namespace.UTS | Namespace.IPC | Namespace.NET)
        # Now: a proc can be made where one can be seen that hides nothing (mount_too_revealing()).
        proc = new_proc()
        devpts = _devpts()
        mounts.attach_new(b"tmpfs", {b"source": b"rootfs", b"mode": b"755"}, Attribute.NONE, ROOT)
        unpacked = _unpack(blueprint)
        described = _described(unpacked)
        mounts.pivot_root_into(ROOT)
        # The root is staged as well so that its file system lives on when the machine has let go of it.
        root = mounts.clone(Path("/"), recursive=False)
        staged = [uevents.open_socket(), _devtmpfs(), _sysfs(), proc, root, *devpts]
        os.umask(0o022)  # as that of init_task
        channel.ask("machine", described, staged)
        for fd in staged:
            os.close(fd)
        namespaces.unshare(Namespace.CGROUP)  # now that it was put into the machine's own group, if it has one
        install_filter(channel, blueprint.rules)
        _kernel_init(channel, blueprint.init)
    except NotJudgedError as error:
        channel.send("not-judged", {"why": str(error)})
    except Exception as error:
        channel.report_failure(error)
    finally:
        os._exit(0)


def _devpts() -> list[int]:
    """Make a devpts where the machine cannot make one with the usual options, for want of the group tty."""
    if sum(ids.size for ids in namespaces.read_map("self", "gid")) > 1:
        return []
    options: dict[bytes, bytes | None] = {b"source": b"devpts", b"mode": b"620", b"ptmxmode": b"666"}
    return [mounts.new_filesystem(b"devpts", options, Attribute.NOSUID | Attribute.NOEXEC)]


def _unpack(blueprint: BootBlueprint) -> Unpacked:
    root = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return unpack(blueprint.image.members, root)
    finally:
        os.close(root)


def _described(unpacked: Unpacked) -> Mapping[str, object]:
    root = mounts.mount_at(ROOT)
    return {
        "modules": _modules(),
        "user_namespace": procfs.namespace("self", "user"),
        "mount": root.id,
        "device": root.device,
        "nodes": [
            [[*map(os.fsdecode, node.paths)], node.mode, os.makedev(node.major, node.minor)] for node in unpacked.nodes
        ],
        "image": {
            "entries": unpacked.entries,
            "size": unpacked.size,
            "fault": None if unpacked.fault is None else str(unpacked.fault),
            "exact": unpacked.fault is None or unpacked.fault.exact,
            "left_out": _some(unpacked.skipped),
            "differences": _some(unpacked.differences),
            "cut": None if unpacked.cut is None else shown(unpacked.cut),
        },
    }


def _some(remarks: Sequence[object]) -> list[str]:
    """Return remarks in words, no more of them than a person would read."""
    more = [f"and {len(remarks) - _MOST_REMARKS} more"] if len(remarks) > _MOST_REMARKS else []
    return [*map(str, remarks[:_MOST_REMARKS]), *more]


def _modules() -> list[str]:
    """Return the releases of the kernels that the image has modules for."""
    found: set[str] = set()
    for directory in (ROOT / "lib/modules", ROOT / "usr/lib/modules"):
        # A link of the image could lead anywhere in this machine.
        if directory.parent.is_symlink() or directory.is_symlink() or not directory.is_dir():
            continue
        found |= {entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink()}
    return sorted(found)


def _devtmpfs() -> int:
    tree = mounts.new_filesystem(b"tmpfs", {b"source": b"devtmpfs", b"mode": b"755"}, Attribute.NOSUID)
    for name in DEVICES:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=tree))
    for name in _DEVICE_DIRECTORIES:
        os.mkdir(name, 0o755, dir_fd=tree)
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, name, dir_fd=tree)
    return tree


def _sysfs() -> int:
    attributes = Attribute.NOSUID | Attribute.NODEV | Attribute.NOEXEC
    tree = mounts.new_filesystem(b"tmpfs", {b"source": b"sysfs", b"mode": b"755"}, attributes)
    for path in _SYSFS:
        for parent in _with_parents(path):
            if not _exists(parent, tree):
                os.mkdir(parent, 0o755, dir_fd=tree)
    return tree


def _with_parents(path: str) -> Iterator[str]:
    words = path.split("/")
    return ("/".join(words[: i + 1]) for i in range(len(words)))


def _exists(path: str, directory: int) -> bool:
    try:
        os.stat(path, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def _kernel_init(channel: Channel, init: InitArguments) -> NoReturn:
    """Be what ``kernel_init()`` is: execute the first program of those that may be the init process."""
    for number in (*IGNORED_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    process.set_name(b"swapper/0")
    if not os.access(init.ramdisk, os.F_OK):
        # prepare_namespace() mounts what root= says instead; the supervisor knows whether it says something.
        channel.send("no-init", {"path": os.fsdecode(init.ramdisk)})
        _hang()
    _open_console(channel)
    error = _execute(init, init.ramdisk)
    _log(channel, f"Failed to execute {os.fsdecode(init.ramdisk)} (error {-error})")
    if init.requested is not None:
        _log(channel, f"Run {os.fsdecode(init.requested)} as init process")
        error = _execute(init, init.requested)
        _panic(channel, f"Requested init {os.fsdecode(init.requested)} failed (error {-error}).")
    for path in LAST_RESORTS:
        _log(channel, f"Run {os.fsdecode(path)} as init process")
        error = _execute(init, path)
        if error != errno.ENOENT:
            _log(channel, f"Starting init: {os.fsdecode(path)} exists but couldn't execute it (error {-error})")
    _panic(
        channel,
        "No working init found.  Try passing init= option to kernel."
        " See Linux Documentation/admin-guide/init.rst for guidance.",
    )


def _open_console(channel: Channel) -> None:
    """Have the image's /dev/console as standard streams, or none at all."""
    try:
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        console = -1
        _log(channel, "Warning: unable to open an initial console.")
    for fd in (0, 1, 2):
        if console >= 0:
            os.dup2(console, fd)
        else:
            os.close(fd)
    if console > 2:
        os.close(console)


def _execute(init: InitArguments, path: bytes) -> int:
    """Execute an init process; return the errno of why not."""
    environment = dict(word.split(b"=", 1) for word in init.environment)
    try:
        os.execve(path, [path, *init.arguments], environment)  # noqa: S606 - no shell is the point
    except OSError as error:
        return error.errno or errno.EINVAL


def _log(channel: Channel, text: str) -> None:
    channel.send("log", {"text": text})


def _panic(channel: Channel, text: str) -> NoReturn:
    channel.send("panic", {"text": text})
    _hang()


def _hang() -> NoReturn:
    """Wait for the supervisor to end the machine, or to have somebody look at it first."""
    while True:
        signal.pause()
