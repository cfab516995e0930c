"""The disks of a rehearsed machine: their nodes, their entries in /sys, /dev and /proc, and device-mapper on them."""

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError, errno_name
from ipe_emu.event import Subject
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.session_keys import SessionKeys
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.keyring import Keyrings
from ipe_emu.linux.syscalls import AT_FDCWD
from ipe_emu.profiles import Profile
from ipe_emu.rehearse.block import plan, proc, udev
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.block.nodes import CONTROL, BlockNodes
from ipe_emu.rehearse.block.plan import Dir, Gone, Link, Node, Step
from ipe_emu.rehearse.block.probe import Probed
from ipe_emu.rehearse.block.uevents import Uevents
from ipe_emu.rehearse.requests import Agent
from ipe_emu.rehearse.staging import DEVICE_NODES, DEVTMPFS, MAPPER, SYSFS

if TYPE_CHECKING:  # device-mapper is imported with its first command: most boots give none
    from ipe_emu.rehearse.device_mapper.control import DeviceMapper
    from ipe_emu.rehearse.device_mapper.mapped_device import MappedDevice
    from ipe_emu.rehearse.device_mapper.target import Corruption, ReadError
    from ipe_securityfs.subtrees import Subtrees
    from ipe_securityfs.tree import Owner

_CAP_SYS_ADMIN: Final = 21
#: How long the session may take to begin, in seconds.
_LONGEST_WAIT: Final = 30.0
#: By number, the nodes of the staged devtmpfs that stand for a character device.
_LENT: Final = {
    (1, 3): "null", (1, 5): "zero", (1, 7): "full", (1, 8): "random", (1, 9): "urandom", (1, 11): "kmsg",
    (5, 0): "tty", (5, 1): "console",
}  # fmt: skip
#: Files of /proc that list devices.
TEXT_FILES: Final = ("partitions", "devices", "misc")


class Telling(Protocol):
    """Who is told what the kernel would log or do; from any thread."""

    def log(self, text: str) -> None:
        """Note a line of the kernel's log."""

    def remark(self, text: str) -> None:
        """Note what is done otherwise than by a kernel."""

    def restart(self, means: str) -> None:
        """The kernel restarts the machine."""

    def panic(self, text: str) -> None:
        """The kernel panics."""

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        """Note what could not be judged."""


@define(eq=False)
class Disks:
    """All that a machine has of block devices; ``probe`` finds what is on them, by name."""

    devices: BlockDevices
    profile: Profile
    keys: SessionKeys
    keyrings: Callable[[], Keyrings]
    agent: Agent
    telling: Telling
    probe: Callable[[], Mapping[str, Probed]]
    require_signatures: bool = False
    #: Called when what is known of a device may have changed.
    facts_changed: Callable[[], None] = field(default=lambda: None, init=False)
    #: The st_dev of the machine's devtmpfs.
    devtmpfs: int = field(default=-1, init=False)
    nodes: BlockNodes = field(init=False)
    uevents: Uevents = field(init=False)
    _mapper: "DeviceMapper | None" = field(default=None, init=False)
    _subtrees: "Subtrees" = field(init=False, repr=False)
    _served: threading.Event = field(factory=threading.Event, init=False, repr=False)
    _placed: set[tuple[int, int, bytes]] = field(factory=set, init=False, repr=False)
    _names: Iterator[int] = field(factory=itertools.count, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.uevents = Uevents(self.devices)
        self.nodes = BlockNodes(self.devices, self, self, self.uevents)

    @property
    def traps(self) -> Sequence[Trap]:
        """The calls that are answered here. Without disks nobody opens one, and open(2) is left alone."""
        return self.nodes.traps if any(self.devices) else self.nodes.making

    # -- before the machine starts ----------------------------------------------------------------------------------

    def serve(self, subtrees: "Subtrees", root: int, session: int) -> None:
        """Tell through which session to serve; see `BlockNodes.serve`."""
        self._subtrees = subtrees
        self.nodes.serve(subtrees, root, session)
        subtrees.add_device(b"control", stat.S_IFCHR | 0o600, CONTROL, directory=subtrees.mapper)
        subtrees.add_text(b"partitions", lambda: proc.partitions(self.devices))
        subtrees.add_text(b"devices", proc.drivers)
        subtrees.add_text(b"misc", proc.misc)
        self._served.set()

    def plan(self, probed: Mapping[str, Probed] | None) -> tuple[list[Step], list[Step]]:
        """Return what is to be made in /sys and in /dev, before the machine starts.

        ``probed`` is what is on the disks, if the image has udev: that would make links to them.
        """
        in_sys: list[Step] = []
        in_dev: list[Step] = [Dir(MAPPER.name)]
        for device in self.devices:
            in_sys += plan.sysfs_of(self.devices, device)
            in_dev += plan.devtmpfs_of(device)
            if probed is not None:
                in_dev += udev.links_of(self.devices, device, probed.get(device.name, Probed()))
        return in_sys, in_dev

    def furnish(self, *, has_udev: bool) -> None:
        """Make that in what the agent has staged, once the session is there. NotJudgedError if it does not come."""
        if not self._served.wait(_LONGEST_WAIT):
            raise NotJudgedError("the session that serves devices did not begin")
        in_sys, in_dev = self.plan(self.probe() if has_udev else None)
        self._make(SYSFS, in_sys)
        self._make(DEVTMPFS, in_dev)
        self.agent.bind(MAPPER, DEVTMPFS / MAPPER.name)

    def _make(self, root: Path, steps: Iterable[Step]) -> None:
        """Have the agent carry out steps below a staged directory."""
        told: list[list[object]] = []
        for step in steps:
            match step:
                case Dir(path):
                    told.append(["directory", path])
                case plan.File(path, content, mode):
                    told.append(["file", path, content, mode])
                case Link(path, target):
                    told.append(["link", path, target])
                case Gone(path):
                    told.append(["gone", path])
                case Node(path, mode, number):
                    told.append(["node", path, str(self.stands_for(mode, number))])
        self.agent.furnish(root, told)

    def stands_for(self, mode: int, number: int, owner: "Owner | None" = None) -> Path:
        """Return a staged file that stands for a device: a device that this machine lends, or a new node."""
        lent = _LENT.get((os.major(number), os.minor(number))) if stat.S_ISCHR(mode) else None
        if lent is not None:
            return DEVTMPFS / lent
        name = f"{os.major(number)}:{os.minor(number)}-{next(self._names)}"
        self._subtrees.add_device(name.encode(), mode, number, owner=owner)
        return DEVICE_NODES / name

    # -- nodes (nodes.Placing) --------------------------------------------------------------------------------------

    def place(self, caller: Caller, directory: int, name: bytes, mode: int, number: int) -> None:
        """Make a node where a process wants it: the one of this machine that stands for it, or one that we serve."""
        from ipe_securityfs.tree import Owner  # noqa: PLC0415 - imported by then, in the thread that serves

        owner = Owner(caller.tracee.status.fsuid, caller.tracee.status.fsgid)
        if self.nodes.is_mapper(os.fstat(directory)):
            try:
                self._subtrees.add_device(name, mode, number, owner=owner, directory=self._subtrees.mapper)
            except FileExistsError:
                raise KernelError(errno.EEXIST, "the name is taken", "filename_create") from None
            return
        self.agent.node(caller.tracee.pid, directory, name, self.stands_for(mode, number, owner))
        self._placed.add(_key(directory, name))

    def is_placed(self, directory: int, name: bytes) -> bool:
        """Whether something was placed there, by a process or by devtmpfs."""
        return _key(directory, name) in self._placed or os.fstat(directory).st_dev == self.devtmpfs

    def uncover(self, caller: Caller, directory: int, name: bytes) -> None:
        """Take a node's mount away."""
        self.agent.uncover(caller.tracee.pid, directory, name)
        self._placed.discard(_key(directory, name))

    # -- device-mapper (nodes.Control, control.Observer) --------------------------------------------------------------

    def ioctl(self, caller: Caller, request: int, argument: int) -> int:
        """Carry out an ioctl on /dev/mapper/control."""
        os.fstatvfs(self.nodes.root)  # the session answers in order: what was closed before has arrived now
        if self._mapper is None:
            self._mapper = self._make_mapper()
        asking = _Asking(caller, argument, self)
        answer = self._mapper.ioctl(request, asking, caller.capable(_CAP_SYS_ADMIN), asking)
        for offset, data in answer.written:
            caller.copy_out(argument + offset, data)
        if answer.errno:
            if self._mapper.logs_failure_of(request):
                self.telling.log(f"device-mapper: {answer.reason} ({errno_name(answer.errno)})")
            raise KernelError(answer.errno, answer.reason, "ctl_ioctl")
        return 0

    def _make_mapper(self) -> "DeviceMapper":
        from ipe_emu.rehearse.device_mapper.control import DeviceMapper  # noqa: PLC0415 - see above
        from ipe_emu.rehearse.device_mapper.types import interface_version, target_types  # noqa: PLC0415 - as above

        types = target_types(self.profile, require_signatures=self.require_signatures)
        return DeviceMapper(self.devices, types, interface_version(self.profile), self)

    def closed(self, number: int) -> None:
        """Hear that a device was closed for the last time, in the thread that serves the session."""
        if self._mapper is None:
            return
        try:
            self._mapper.closed(number)
        except NotJudgedError as error:
            self.telling.not_judged(None, "close", str(error))

    def appeared(self, device: "MappedDevice") -> None:
        """Show a mapped device in /sys and /dev."""
        block = device.block_device
        self._make(SYSFS, plan.sysfs_of(self.devices, block, **_names(device)))
        self._make(DEVTMPFS, plan.devtmpfs_of(block))
        self.uevents.tell(block, "add")

    def tell_udev(self, device: "MappedDevice", action: str, cookie: int) -> None:
        """Tell udev of a mapped device (``dm_kobject_uevent()``)."""
        self.uevents.tell(device.block_device, action, {"DM_COOKIE": str(cookie)} if cookie else {})

    def changed(self, device: "MappedDevice") -> None:
        """Show what a mapped device is now."""
        self.facts_changed()
        block = device.block_device
        if not device.registered:
            return
        steps: list[Step] = [*plan.sysfs_state(self.devices, block, **_names(device))]
        for lower in device.active.used if device.active else ():
            steps += plan.dependence(self.devices, block, lower)
        self._make(SYSFS, steps)

    def disappeared(self, device: "MappedDevice") -> None:
        """Show it no more."""
        lower = device.active.used if device.active else []
        self.uevents.tell(device.block_device, "remove")
        self._make(SYSFS, plan.gone(self.devices, device.block_device, lower))
        self._make(DEVTMPFS, [Gone(device.block_device.name)])

    def remark(self, text: str) -> None:
        """Note what a table does otherwise."""
        self.telling.remark(text)

    def unknown(self, text: str) -> None:
        """Note what cannot be known."""
        self.telling.not_judged(None, "read", text)

    def faulty(self, fault: "Corruption | ReadError") -> None:
        """Log it, and end the machine if the table says so (``verity_handle_err()``, ``verity_finish_io()``)."""
        from ipe_emu.rehearse.device_mapper.target import Corruption  # noqa: PLC0415 - as device-mapper

        if isinstance(fault, Corruption):
            self.telling.log(f"device-mapper: verity: {fault.data_device}: {fault.reason}")
            event, message = "corruption", "dm-verity device corrupted"
        else:
            event, message = "error", f"dm-verity device has I/O error ({fault.device}: {fault.reason})"
        if fault.action == "restart":
            self.telling.restart(f"restart_on_{event} of the verity device {fault.device}: {message}")
        elif fault.action == "panic":
            self.telling.panic(message)

    def finish(self) -> None:
        """Hear that the machine has ended by itself."""
        if self._mapper is not None:
            self._mapper.finish()


def _key(directory: int, name: bytes) -> tuple[int, int, bytes]:
    st = os.fstat(directory)
    return st.st_dev, st.st_ino, name


def _names(device: "MappedDevice") -> dict[str, str]:
    return {"name": os.fsdecode(device.name), "uuid": os.fsdecode(device.uuid)}


@define(eq=False)
class _Asking:
    """The caller of an ioctl, as device-mapper sees it (`control.Memory`, `target.Surroundings`)."""

    caller: Caller
    argument: int
    disks: Disks

    def read(self, offset: int, length: int) -> bytes:
        return self.caller.copy_in(self.argument + offset, length)

    def lookup_bdev(self, path: bytes) -> int:
        if not path:
            raise KernelError(errno.EINVAL, "no path", "lookup_bdev")
        st = os.fstat(self.caller.look_up(AT_FDCWD, path))
        if not stat.S_ISBLK(st.st_mode):
            raise KernelError(errno.ENOTBLK, f"{os.fsdecode(path)} is no block device", "lookup_bdev")
        return st.st_rdev

    def user_key(self, description: bytes) -> bytes:
        found = self.disks.keys.find(self.caller, b"user", description)
        if found is None:
            raise KernelError(errno.ENOKEY, f"there is no key {os.fsdecode(description)!r}", "request_key")
        return found

    def verify_root_hash(self, text: bytes, signature: bytes) -> None:
        from ipe_emu.integrity.dm_verity.signature import verify_root_hash_text  # noqa: PLC0415 - as device-mapper

        hashes = self.disks.profile.unavailable_hashes
        verify_root_hash_text(text, signature, self.disks.keyrings(), unavailable_hashes=hashes)
