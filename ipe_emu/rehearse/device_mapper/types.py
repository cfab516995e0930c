"""The target types of a kernel, and the version of its ioctl interface."""

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from ipe_emu.profiles import Profile
from ipe_emu.rehearse.device_mapper import crypt, simple
from ipe_emu.rehearse.device_mapper.target import TargetType, TargetTypes
from ipe_emu.rehearse.device_mapper.verity import VerityType

Version = tuple[int, int, int]


@frozen
class _Versions:
    """What the drivers of one kernel say of themselves."""

    interface: Version
    verity: Version
    linear: Version
    crypt: Version
    #: Whether the status of verity counts corrected blocks (``verity_status()``).
    corrections: bool


_LINUX_6_12: Final = _Versions(
    interface=(4, 48, 0), verity=(1, 10, 0), linear=(1, 4, 0), crypt=(1, 28, 0), corrections=False
)
_LINUX_7_3: Final = _Versions(
    interface=(4, 50, 0), verity=(1, 13, 0), linear=(1, 5, 0), crypt=(1, 29, 0), corrections=True
)
_BY_PROFILE: Final[Mapping[str, _Versions]] = {
    "linux-6.12": _LINUX_6_12,
    "linux-7.3": _LINUX_7_3,
    "op-policy": _LINUX_7_3,
}


def interface_version(profile: Profile) -> Version:
    """Return the version that a kernel's device-mapper gives (``DM_VERSION_MINOR`` and its kin)."""
    return _BY_PROFILE[profile.name].interface


def target_types(profile: Profile, *, require_signatures: bool = False) -> TargetTypes:
    """Return the target types that are emulated; see `verity.VerityType` for ``require_signatures``."""
    versions = _BY_PROFILE[profile.name]
    verity = VerityType(versions.corrections, require_signatures)
    types = (
        TargetType("crypt", versions.crypt, crypt.crypt),
        TargetType("error", (1, 7, 0), simple.error),
        TargetType("linear", versions.linear, simple.linear),
        TargetType("verity", versions.verity, verity, singleton=True, immutable=True),
        TargetType("zero", (1, 2, 0), simple.zero),
    )
    return {known.name: known for known in types}
