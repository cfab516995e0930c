"""What differs between the kernels that are emulated, as one table of named profiles."""

from collections.abc import Mapping
from types import MappingProxyType

from attrs import evolve, frozen


@frozen
class Profile:
    """The behaviours of one kernel. Between the released kernels no errno of the nodes differs.

    A compressed module is op=KMODULE in both: 6.12 reads it as READING_MODULE like any other, 7.3 has an id of its
    own for it that IPE treats alike (the kernels in between, which did not, are not emulated).

    ``audits_failed_loads``: a load that fails writes a 1422 record with ``res=0``.
    ``audits_errno``: 1422 records end with ``errno=``.
    ``execve_check``: execveat(2) knows AT_EXECVE_CHECK, and IPE the hook BPRM_CREDS_FOR_EXEC.
    ``strict_cpio_headers``: an initramfs whose headers hold anything but hexadecimal digits is damaged.
    ``dm_verity_keyring``: dm-verity has a keyring of its own, ``.dm-verity``.
    ``nullfs``: the initramfs is mounted on an empty root that nobody sees, and so is no first root: it can be pivoted.
    ``unsigned_policies``: op=POLICY can admit an unsigned policy, and ``activate`` also names ``active``.
    ``unavailable_hashes``: digests that are known to the PKCS#7 parser and not built into the recorded kernel.
    """

    name: str
    audits_failed_loads: bool = False
    audits_errno: bool = False
    execve_check: bool = False
    strict_cpio_headers: bool = False
    dm_verity_keyring: bool = False
    nullfs: bool = False
    unsigned_policies: bool = False
    unavailable_hashes: frozenset[str] = frozenset()


# Neither recorded kernel was built with Streebog; 7.3's configuration lost SM3 as well.
_NO_STREEBOG = frozenset({"streebog256", "streebog512"})

_LINUX_6_12 = Profile(name="linux-6.12", unavailable_hashes=_NO_STREEBOG)
_LINUX_7_3 = Profile(
    name="linux-7.3",
    audits_failed_loads=True,
    audits_errno=True,
    execve_check=True,
    strict_cpio_headers=True,
    dm_verity_keyring=True,
    nullfs=True,
    unavailable_hashes=_NO_STREEBOG | {"sm3"},
)
_OP_POLICY = evolve(_LINUX_7_3, name="op-policy", unsigned_policies=True)

PROFILES: Mapping[str, Profile] = MappingProxyType({p.name: p for p in (_LINUX_6_12, _LINUX_7_3, _OP_POLICY)})
DEFAULT_PROFILE = _OP_POLICY
#: The released kernel that op-policy extends: what it admits is compared with this one's answer.
UPSTREAM_OF_OP_POLICY = _LINUX_7_3
