"""Taking note of the layers of an overlay while it is mounted: mount(2)."""

import errno
import os
from typing import Final

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.execve import read_path
from ipe_emu.exec_hook.overlays import Layer, Overlay, Overlays
from ipe_emu.exec_hook.plan import Fail, Plan
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.linux import mounts
from ipe_emu.linux.overlayfs import NAME, Options
from ipe_emu.linux.syscalls import AT_FDCWD

# MS_REMOUNT, MS_BIND, MS_MOVE and changes of propagation make no superblock.
_NO_NEW_MOUNT: Final = 0x20 | 0x1000 | 0x2000 | 0x20000 | 0x40000 | 0x80000 | 0x100000
_CAP_SYS_ADMIN: Final = 21
_LONGEST_OPTIONS: Final = 4096  # copy_mount_options(): one page
#: Layers that are kept open; more than an initramfs ever mounts.
_MOST_LAYERS: Final = 256


@define(eq=False)
class OverlayMounts:
    """Looks at the calls that mount overlays, for ``overlays`` to know their layers."""

    overlays: Overlays
    _kept: int = field(default=0, init=False)

    @property
    def traps(self) -> tuple[Trap, ...]:
        """The calls; none of them is answered here but fsopen(2) of an overlay."""
        return (Trap("mount", self.note_mount), Trap("fsopen", self.plan_fsopen))

    def plan_fsopen(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """Have overlays be mounted by mount(2), as programs do where there is no fsopen(2)."""
        if _string(caller, args[0]) != NAME.encode():
            return None
        return Plan(Fail(KernelError(errno.ENOSYS, "overlays are mounted by mount(2) here", "fsopen")))

    def note_mount(self, caller: Caller, args: tuple[int, ...]) -> None:
        """Look up the layers of an overlay that is about to be mounted; the call goes on in any case."""
        kind, flags, data = args[2:5]
        if flags & _NO_NEW_MOUNT or not data or _string(caller, kind) != NAME.encode():
            return
        if not caller.tracee.status.capable(_CAP_SYS_ADMIN):
            return  # EPERM from the kernel
        try:
            text = caller.tracee.string(data, _LONGEST_OPTIONS)
        except OSError:
            return  # EFAULT from the kernel
        options = None if text is None else Options.parse(text)
        if options is None:
            return
        overlay = self._looked_up(caller, options)
        if self.overlays.knows(options, overlay):
            _close(overlay.layers)
        else:
            self._kept += len(overlay.layers)
            self.overlays.note(options, overlay)

    def _looked_up(self, caller: Caller, options: Options) -> Overlay:
        paths = [*([] if options.upper is None else [options.upper]), *options.lowers]
        if self._kept + len(paths) > _MOST_LAYERS:
            return Overlay(why_not="too many layers of overlays")
        layers: list[Layer] = []
        for path in paths:
            try:
                layers.append(self._layer(caller, path))
            except (OSError, NotJudgedError) as error:  # KernelError is one: mount(2) will say the same
                _close(layers)
                return Overlay(why_not=f"{os.fsdecode(path)}, a layer of it, could not be looked at: {error}")
        return Overlay(tuple(layers))

    def _layer(self, caller: Caller, path: bytes) -> Layer:
        found = caller.look_up(AT_FDCWD, path)
        mount, location = caller.locate(found)
        if location is None:
            raise NotJudgedError("its mount cannot be seen")
        within = self.overlays.of_device(location.device) if mount.superblock == NAME else None
        status = os.fstat(found)
        copy = mounts.clone_in_namespace_of(caller.tracee.pid, found)
        return Layer(copy, (status.st_dev, status.st_ino), location, mount.superblock, within)


def _close(layers: "list[Layer] | tuple[Layer, ...]") -> None:
    for layer in layers:
        os.close(layer.fd)


def _string(caller: Caller, address: int) -> bytes | None:
    try:
        return read_path(caller.tracee, address) if address else None
    except KernelError:
        return None
