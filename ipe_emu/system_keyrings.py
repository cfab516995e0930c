"""The kernel's own keyrings as a program meets them through add_key(2) and keyctl(2).

Nobody possesses them, so that of a key's permissions only the user's count, and these for the machine's root alone:
``key_task_permission()`` compares user ids and asks for no capability. What is in a keyring counts at once for
whatever is verified next: after each change ``publish`` is given the `Keyrings` of that moment.

Sources: certs/system_keyring.c, security/integrity/digsig.c, fs/verity/signature.c, drivers/md/dm-verity-verify-sig.c
for the keyrings; security/keys/{keyctl,key,keyring,permission,proc}.c for what is done with them.
"""

import enum
import errno
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from attrs import define, evolve, field

from ipe_emu.errors import KernelError, NotJudgedError, UserError
from ipe_emu.keyring import Keyring, Keyrings
from ipe_emu.pkcs7.restrict import restrict_link_by_signature
from ipe_emu.pkcs7.x509 import Certificate, parse_certificate
from ipe_emu.profiles import Profile

ASYMMETRIC: Final = b"asymmetric"
_KEYRING: Final = b"keyring"
#: Raises KernelError for a certificate that may not enter a keyring (``key_restrict_link_func_t``).
Restriction = Callable[[Certificate], None]


class Permission(enum.IntFlag):
    """What may be done with a key, as one of the four bytes of its permissions has it (include/linux/key.h)."""

    VIEW = 0x01
    READ = 0x02
    WRITE = 0x04
    SEARCH = 0x08
    LINK = 0x10
    SETATTR = 0x20


_POSSESSOR: Final = 24
_USER: Final = 16
_OTHER: Final = 0
_ALL: Final = 0x3F
_ALL_BUT_SETATTR: Final = 0x1F << _POSSESSOR
_SEEN: Final = (Permission.VIEW | Permission.READ | Permission.SEARCH) << _USER
_VALID_PERMISSIONS: Final = _ALL << 24 | _ALL << 16 | _ALL << 8 | _ALL
#: builtin, platform; secondary, which can be added to; those of fs-verity and dm-verity, which can be closed as well
_FIXED: Final = _ALL_BUT_SETATTR | _SEEN
_GROWING: Final = _FIXED | Permission.WRITE << _USER
_OPEN: Final = (
    Permission.SEARCH << _POSSESSOR | _SEEN | (Permission.WRITE | Permission.SETATTR) << _USER
)  # fmt: skip
#: Certificates: of the builtin keyring, of the platform's, and those that add_key(2) made (``KEY_PERM_UNDEF``).
_BUILTIN_KEY: Final = _ALL_BUT_SETATTR | (Permission.VIEW | Permission.READ) << _USER
_PLATFORM_KEY: Final = _ALL_BUT_SETATTR | Permission.VIEW << _USER
_ADDED_KEY: Final = (
    Permission.VIEW | Permission.SEARCH | Permission.LINK | Permission.SETATTR
) << _POSSESSOR | Permission.VIEW << _USER

_FIRST_SERIAL: Final = 1 << 24
_LAST_SERIAL: Final = (1 << 31) - 1


@define(eq=False)
class Key:
    """A certificate in a keyring, under a description of its own or the one that adding it made."""

    serial: int
    description: bytes
    perm: int
    certificate: Certificate

    kind = ASYMMETRIC

    @property
    def shown(self) -> bytes:
        """What /proc/keys says of it (``asymmetric_key_describe()``)."""
        skid = self.certificate.skid
        tail = b" " + skid[-4:].hex().encode() if skid is not None else b""
        return self.description + b": X509." + self.certificate.public_key.algorithm.encode() + tail + b" []"


@define(eq=False)
class SystemKeyring:
    """One of the kernel's keyrings. ``restriction`` is None as long as it takes any certificate."""

    serial: int
    name: str
    perm: int
    keys: list[Key]
    restriction: Restriction | None = None
    links: tuple["SystemKeyring", ...] = ()

    kind = _KEYRING

    @property
    def description(self) -> bytes:
        """Its name."""
        return self.name.encode()

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """What is in it, without what is linked to it."""
        return tuple(key.certificate for key in self.keys)

    @property
    def shown(self) -> bytes:
        """What /proc/keys says of it (``keyring_describe()``)."""
        count = len(self.keys) + len(self.links)
        return self.description + (b": %d" % count if count else b": empty")


@define(eq=False)
class SystemKeyrings:
    """All of them, on one machine.

    ``is_root`` in every call is whether the caller's fsuid is the machine's root; ``serial`` a key or keyring of these
    (see ``knows``). ``publish`` is given what is trusted after each change. ``admit_to_ipe`` decides for the keyring
    ``.ipe``, raising KernelError, before the certificate enters. ``dm_verity_unsealed`` is dm-verity's parameter
    ``keyring_unsealed``.
    """

    profile: Profile
    boot: Keyrings
    publish: Callable[[Keyrings], None]
    dm_verity_unsealed: bool = False
    _serials: set[int] = field(factory=set, init=False)
    _builtin: SystemKeyring = field(init=False)
    _secondary: SystemKeyring = field(init=False)
    _fsverity: SystemKeyring = field(init=False)
    _dm_verity: SystemKeyring | None = field(default=None, init=False)
    _ipe: SystemKeyring | None = field(default=None, init=False)
    _all: list[SystemKeyring] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        boot = self.boot
        self._builtin = self._keyring(".builtin_trusted_keys", _FIXED, boot.builtin, _BUILTIN_KEY)
        self._secondary = self._keyring(".secondary_trusted_keys", _GROWING, boot.secondary, _PLATFORM_KEY)
        self._secondary.links = (self._builtin,)
        self._secondary.restriction = self._builtin_and_secondary_trusted
        if boot.platform is not None:
            self._keyring(".platform", _FIXED, boot.platform, _PLATFORM_KEY)
        self._fsverity = self._keyring(".fs-verity", _OPEN, boot.fsverity, _ADDED_KEY)
        if self.profile.dm_verity_keyring:
            self._dm_verity = self._keyring(".dm-verity", _OPEN, boot.dm_verity, _ADDED_KEY)
            if not self.dm_verity_unsealed:
                self._dm_verity.restriction = restrict_link_reject
        if self.profile.unsigned_policies:
            self._ipe = self._keyring(".ipe", _OPEN, Keyring(), _ADDED_KEY)
        self._changed()

    def _keyring(self, name: str, perm: int, certificates: Keyring, key_perm: int) -> SystemKeyring:
        keys = [Key(self._serial(), c.description, key_perm, c) for c in certificates.certificates]
        keyring = SystemKeyring(self._serial(), name, perm, keys)
        self._all.append(keyring)
        return keyring

    def _serial(self) -> int:
        """Return a number of the kind that ``key_alloc_serial()`` gives: random, positive, not in use here."""
        while True:
            serial = _FIRST_SERIAL + secrets.randbelow(_LAST_SERIAL - _FIRST_SERIAL)
            if serial not in self._serials:
                self._serials.add(serial)
                return serial

    # -- looking ------------------------------------------------------------------------------------------------

    def knows(self, serial: int) -> bool:
        """Whether a number is that of a key or keyring of these."""
        return serial in self._serials

    def name_of(self, serial: int) -> str:
        """Return what a key is about, for people."""
        key = next(key for key in self if key.serial == serial)
        return key.certificate.readable_name if isinstance(key, Key) else key.name

    def __iter__(self) -> Iterator[SystemKeyring | Key]:
        for keyring in self._all:
            yield keyring
            yield from tuple(keyring.keys)

    def proc_keys(self) -> bytes:
        """Return their lines of /proc/keys, as root sees them (``proc_keys_show()``)."""
        lines = [
            b"%08x I------ %5d perm %08x     0     0 %-9.9s %s\n" % (key.serial, 1, key.perm, key.kind, key.shown)
            for key in self
            if key.perm >> _USER & Permission.VIEW
        ]
        return b"".join(sorted(lines))

    def get_keyring_id(self, serial: int, *, is_root: bool) -> int:
        """Return the number itself (``keyctl_get_keyring_ID()``)."""
        return self._look_up(serial, Permission.SEARCH, is_root=is_root).serial

    def describe(self, serial: int, *, is_root: bool) -> bytes:
        """Return ``type;uid;gid;perm;description`` and a NUL (``keyctl_describe_key()``)."""
        key = self._look_up(serial, Permission.VIEW, is_root=is_root)
        return b"%s;0;0;%08x;%s\0" % (key.kind, key.perm, key.description)

    def read(self, serial: int, *, is_root: bool) -> bytes:
        """Return the serial numbers of what is in a keyring (``keyctl_read_key()``, ``keyring_read()``)."""
        key = self._look_up(serial, Permission.READ, is_root=is_root)
        if isinstance(key, Key):
            raise KernelError(errno.EOPNOTSUPP, "a certificate cannot be read back", "__keyctl_read_key")
        numbers = [linked.serial for linked in key.links] + [entry.serial for entry in key.keys]
        return struct.pack(f"={len(numbers)}i", *numbers)

    def search(self, serial: int, kind: bytes, description: bytes, *, is_root: bool) -> int:
        """Look for a key below a keyring (``keyctl_keyring_search()``). No certificate grants anybody Search."""
        start = self._look_up(serial, Permission.SEARCH, is_root=is_root)
        if isinstance(start, Key):
            raise KernelError(errno.ENOTDIR, "a search begins at a keyring", "keyring_search_rcu")
        below = (start, *start.links)
        if kind == _KEYRING:
            found = next((k for k in below if k.description == description), None)
            if found is not None:
                return found.serial
        elif kind != ASYMMETRIC:
            raise NotJudgedError(f"a search for a key of type {kind!r} in {start.name}")
        elif any(_matches(key, description) for keyring in below for key in keyring.keys):
            raise KernelError(errno.EACCES, "found, but it may not be searched for", "keyring_search_iterator")
        raise KernelError(errno.ENOKEY, f"no such key in {start.name}", "keyctl_keyring_search")

    def _look_up(self, serial: int, need: Permission, *, is_root: bool) -> SystemKeyring | Key:
        """Find a key and check what is needed of it (``lookup_user_key()``, ``key_task_permission()``)."""
        found: SystemKeyring | Key | None = next((key for key in self if key.serial == serial), None)
        if found is None:
            raise KernelError(errno.ENOKEY, "this key was unlinked and is gone", "lookup_user_key")
        if not found.perm >> (_USER if is_root else _OTHER) & need:
            reason = f"the permissions {found.perm:08x} do not grant {need.name} to {'root' if is_root else 'others'}"
            raise KernelError(errno.EACCES, reason, "key_task_permission")
        return found

    def _look_up_keyring(self, serial: int, need: Permission, *, is_root: bool) -> SystemKeyring:
        found = self._look_up(serial, need, is_root=is_root)
        if isinstance(found, Key):
            raise KernelError(errno.ENOTDIR, "this is a key, and a keyring is wanted", "key_create_or_update")
        return found

    # -- changing -----------------------------------------------------------------------------------------------

    def is_ipe(self, serial: int) -> bool:
        """Whether a number is that of the keyring ``.ipe``, which op=POLICY guards."""
        return self._ipe is not None and self._ipe.serial == serial

    def add_key(
        self,
        serial: int,
        kind: bytes,
        description: bytes,
        payload: bytes,
        *,
        is_root: bool,
        admit: Callable[[], None] | None = None,
    ) -> int:
        """Make a key of a certificate and put it into a keyring; return its number (``key_create_or_update()``).

        ``description`` is empty where the certificate is to give it. ``admit`` is asked last, raising KernelError.
        """
        keyring = self._look_up_keyring(serial, Permission.WRITE, is_root=is_root)
        if kind != ASYMMETRIC:
            raise NotJudgedError(f"adding a key of type {kind!r} to {keyring.name}, where only certificates count")
        certificate = self._parse(payload)
        if keyring.restriction is not None:
            keyring.restriction(certificate)
        if admit is not None:
            admit()
        key = Key(self._serial(), description or certificate.description, _ADDED_KEY, certificate)
        before = keyring.keys
        # A link to a key of the same type and description is replaced (``__key_link_begin()``).
        keyring.keys = [*(k for k in before if k.description != key.description), key]
        try:
            self._changed()
        except UserError as error:
            keyring.keys = before
            raise NotJudgedError(f"adding to {keyring.name}: {error}") from None
        return key.serial

    def _parse(self, payload: bytes) -> Certificate:
        if not payload:
            raise KernelError(errno.EINVAL, "an empty certificate", "asymmetric_key_preparse")
        certificate = parse_certificate(payload, self.profile.unavailable_hashes)
        if self.boot.is_blacklisted(certificate):
            raise KernelError(errno.EKEYREJECTED, "the certificate is blacklisted", "x509_key_preparse")
        return certificate

    def unlink(self, serial: int, ring: int, *, is_root: bool) -> None:
        """Take a key out of a keyring (``keyctl_keyring_unlink()``); of the key itself nothing is asked."""
        keyring = self._look_up_keyring(ring, Permission.WRITE, is_root=is_root)
        if any(linked.serial == serial for linked in keyring.links):
            raise NotJudgedError(f"taking the builtin keys out of {keyring.name}")
        if not serial:
            raise KernelError(errno.EINVAL, "0 is no key", "lookup_user_key")
        if serial not in [key.serial for key in self]:
            raise KernelError(errno.ENOKEY, "no such key", "lookup_user_key")
        kept = [key for key in keyring.keys if key.serial != serial]
        if len(kept) == len(keyring.keys):
            raise KernelError(errno.ENOENT, f"the key is not in {keyring.name}", "__key_unlink_begin")
        keyring.keys = kept
        self._changed()

    def clear(self, serial: int, *, is_root: bool) -> None:
        """Empty a keyring (``keyctl_keyring_clear()``)."""
        keyring = self._look_up_keyring(serial, Permission.WRITE, is_root=is_root)
        if keyring.links:
            raise NotJudgedError(f"clearing {keyring.name}, which takes the builtin keys out of it")
        keyring.keys = []
        self._changed()

    def set_permissions(self, serial: int, perm: int, *, is_root: bool) -> None:
        """Change the permissions of a keyring (``keyctl_setperm_key()``)."""
        if perm & ~_VALID_PERMISSIONS:
            raise KernelError(errno.EINVAL, f"{perm:#x} are no permissions", "keyctl_setperm_key")
        self._look_up(serial, Permission.SETATTR, is_root=is_root).perm = perm

    def restrict_keyring(self, serial: int, kind: bytes | None, restriction: bytes, *, is_root: bool) -> None:
        """Say what may enter a keyring from now on; without a type, nothing (``keyctl_restrict_keyring()``)."""
        keyring = self._look_up_keyring(serial, Permission.SETATTR, is_root=is_root)
        check = restrict_link_reject if kind is None else self._restriction(kind, restriction)
        if keyring.restriction is not None:
            raise KernelError(errno.EEXIST, f"{keyring.name} is restricted already", "keyring_restrict")
        keyring.restriction = check
        self._changed()

    def require(self, serial: int, need: Permission, *, is_root: bool) -> None:
        """Raise KernelError unless a key grants something."""
        self._look_up(serial, need, is_root=is_root)

    def _restriction(self, kind: bytes, text: bytes) -> Restriction:
        """Read a restriction's name (``asymmetric_lookup_restriction()``)."""
        if kind == _KEYRING:
            raise KernelError(errno.ENOENT, "keys of this type know no restrictions", "keyring_restrict")
        if kind != ASYMMETRIC:
            raise NotJudgedError(f"a restriction by keys of type {kind!r}")
        if text == b"builtin_trusted":
            return self._builtin_trusted
        if text == b"builtin_and_secondary_trusted":
            return self._builtin_and_secondary_trusted
        if text.partition(b":")[0] == b"key_or_keyring" and b":" in text:
            raise NotJudgedError("a restriction to what chosen keys have signed (key_or_keyring)")
        raise KernelError(errno.EINVAL, f"no restriction is named {text[:64]!r}", "asymmetric_lookup_restriction")

    def _builtin_trusted(self, certificate: Certificate) -> None:
        restrict_link_by_signature(certificate, self.boot, (self.boot.builtin,))

    def _builtin_and_secondary_trusted(self, certificate: Certificate) -> None:
        where = (Keyring(self._secondary.certificates), self.boot.builtin)
        restrict_link_by_signature(certificate, self.boot, where)

    def _changed(self) -> None:
        self.publish(
            evolve(
                self.boot,
                secondary=self._secondary.certificates,
                fsverity=self._fsverity.certificates,
                # Asked only once nobody can add to it any more (``verity_verify_root_hash()``).
                dm_verity=_sealed(self._dm_verity),
                ipe=self._ipe.certificates if self._ipe is not None else (),
            )
        )


def _sealed(keyring: SystemKeyring | None) -> Iterable[Certificate]:
    return keyring.certificates if keyring is not None and keyring.restriction is not None else ()


def restrict_link_reject(_certificate: Certificate) -> None:
    """Let nothing enter (security/keys/keyring.c)."""
    raise KernelError(errno.EPERM, "the keyring was closed", "restrict_link_reject")


def _matches(key: Key, description: bytes) -> bool:
    """Whether a search finds a certificate (``asymmetric_key_match_preparse()``)."""
    for prefix, whole in ((b"id:", False), (b"ex:", True)):
        if description.startswith(prefix):
            try:
                wanted = bytes.fromhex(description[3:].decode("ascii"))
            except ValueError:
                return False
            identifiers = key.certificate.identifiers
            return any(i == wanted if whole else bool(wanted) and i.endswith(wanted) for i in identifiers)
    return key.description == description
