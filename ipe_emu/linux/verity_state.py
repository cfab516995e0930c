"""What this machine's kernel vouches for, in one object (``integrity.kernel_state.Kernel``)."""

from ipe_emu.linux import device_mapper, fsverity, statx
from ipe_emu.linux.mountinfo import MountEntry, OwnMounts
from ipe_emu.linux.overlayfs import MachineOverlay


class VerityState:
    """Asks the kernel; what a device consists of is asked once for each major number that is not device-mapper's."""

    def __init__(self) -> None:
        self._other_majors: set[str] = set()
        self._mounts = OwnMounts()
        self._overlays: dict[str, tuple[MountEntry, MachineOverlay]] = {}

    def measure_verity(self, fd: int) -> tuple[int, bytes]:
        """See `fsverity.measure_verity`."""
        return fsverity.measure_verity(fd)

    def read_signature(self, fd: int, limit: int) -> bytes:
        """See `fsverity.read_signature`."""
        return fsverity.read_signature(fd, limit)

    def is_sealed(self, fd: int) -> bool:
        """See `statx.is_sealed`."""
        return statx.is_sealed(fd)

    def verity_table(self, device: str) -> str | None:
        """See `device_mapper.verity_table`."""
        major = device.partition(":")[0]
        if major in self._other_majors:
            return None
        if not device_mapper.is_device_mapper(device):
            self._other_majors.add(major)
            return None
        return device_mapper.verity_table(device)

    def overlay(self, device: str) -> MachineOverlay | None:
        """Return what is known of the overlay with this device number; None if it is none that this process sees."""
        mount = self._mounts.of_device(device)
        if mount is None:
            return None
        known = self._overlays.get(device)
        # Its layers stay the same as long as it lasts; a later one with its number is another mount.
        if known is None or known[0] is not mount:
            known = self._overlays[device] = mount, MachineOverlay.of(device, mount.options)
        return known[1]
