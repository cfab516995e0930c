"""What the kernel tells udev of block devices, and the files of sysfs through which it is made to tell it again.

Source: ``kobject_uevent_env()``, ``kobject_synth_uevent()`` in lib/kobject_uevent.c.
"""

import errno
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.linux import uevents
from ipe_emu.rehearse.block.device import BlockDevice, BlockDevices
from ipe_emu.rehearse.block.plan import home, properties

_ACTIONS: Final = frozenset({"add", "remove", "change", "move", "online", "offline", "bind", "unbind"})
#: After an action, whoever writes it may name his event, and add variables to it.
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_VARIABLE: Final = re.compile(r"([0-9A-Za-z]+)=([0-9A-Za-z]+)")


def event(devices: BlockDevices, device: BlockDevice, action: str, more: Mapping[str, str]) -> bytes:
    """Return an event of a device, but for SEQNUM; ``more`` are variables of this event alone."""
    path = "/" + home(devices, device)
    variables = {"ACTION": action, "DEVPATH": path, "SUBSYSTEM": "block", **more, **properties(device)}
    lines = [f"{action}@{path}", *(f"{name}={value}" for name, value in variables.items())]
    return "".join(f"{line}\0" for line in lines).encode(errors="surrogateescape")


def synthetic(text: str) -> tuple[str, dict[str, str]]:
    """Return action and variables of what is written to ``uevent``. KernelError EINVAL if it means nothing."""
    action, *words = text.rstrip("\n").split(" ")
    if action not in _ACTIONS:
        raise KernelError(errno.EINVAL, f"{action!r} is no action of a uevent", "kobject_action_type")
    if not words:
        return action, {"SYNTH_UUID": "0"}
    if not _UUID.fullmatch(words[0]):
        raise KernelError(errno.EINVAL, "no uuid of an event", "kobject_action_args")
    found = {"SYNTH_UUID": words[0]}
    for word in words[1:]:
        variable = _VARIABLE.fullmatch(word)
        if variable is None:
            raise KernelError(errno.EINVAL, f"{word!r} is no variable of an event", "kobject_action_args")
        found[f"SYNTH_ARG_{variable[1]}"] = variable[2]
    return action, found


@define(eq=False)
class Uevents:
    """Tells the machine's first network namespace of its devices; from any thread.

    ``owner`` is the uid and gid of its root. Before `begin` nobody is there to be told.
    """

    devices: BlockDevices
    owner: int = 0
    _sender: socket.socket | None = field(default=None, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def begin(self, sender: int, owner: int) -> None:
        """Take a socket that was made there (`uevents.open_socket`)."""
        self._sender, self.owner = socket.socket(fileno=sender), owner

    def tell(self, device: BlockDevice, action: str, more: Mapping[str, str] | None = None) -> None:
        """Tell of a device. NotJudgedError if this machine's kernel does not pass it on."""
        if self._sender is None:
            return
        try:
            with self._lock:
                uevents.send(self._sender, event(self.devices, device, action, more or {}), self.owner)
        except OSError as error:
            raise NotJudgedError(f"an event of {device.name} cannot be sent to udev: {error.strerror}") from None


@define(eq=False)
class UeventFile:
    """What stands for a device's ``uevent`` while it is open for writing (`ipe_securityfs.subtrees.Disk`)."""

    device: BlockDevice
    uevents: Uevents
    _closed: Callable[[], None]
    _openers: int = field(default=0, init=False)
    size: int = field(default=0, init=False)

    def read(self, _offset: int, _length: int) -> bytes:
        """Read nothing: it is open for writing."""
        return b""

    def write(self, _offset: int, data: bytes) -> int:
        """Tell of the device what is written."""
        self.uevents.tell(self.device, *synthetic(os.fsdecode(data)))
        return len(data)

    def opened(self) -> None:
        """Count a file that is open on it."""
        self._openers += 1

    def closed(self) -> None:
        """Forget it with the last."""
        self._openers -= 1
        if not self._openers:
            self._closed()
