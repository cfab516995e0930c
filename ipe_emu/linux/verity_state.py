"""What this machine's kernel vouches for, in one object (``integrity.kernel_state.Kernel``)."""

from ipe_emu.linux import device_mapper, fsverity


class VerityState:
    """Asks the kernel; what a device consists of is asked once for each major number that is not device-mapper's."""

    def __init__(self) -> None:
        self._other_majors: set[str] = set()

    def measure_verity(self, fd: int) -> tuple[int, bytes]:
        """See `fsverity.measure_verity`."""
        return fsverity.measure_verity(fd)

    def read_signature(self, fd: int, limit: int) -> bytes:
        """See `fsverity.read_signature`."""
        return fsverity.read_signature(fd, limit)

    def verity_table(self, device: str) -> str | None:
        """See `device_mapper.verity_table`."""
        major = device.partition(":")[0]
        if major in self._other_majors:
            return None
        if not device_mapper.is_device_mapper(device):
            self._other_majors.add(major)
            return None
        return device_mapper.verity_table(device)
