"""The kernel's own keyrings: who may do what with them, and what counts afterwards."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.pkcs7.x509 import Certificate
from ipe_emu.profiles import PROFILES
from ipe_emu.system_keyrings import SystemKeyring, SystemKeyrings
from tests.vectors import KEYS


def certificate(name: str) -> Certificate:
    (found,) = load_certificates([KEYS / f"{name}.pem"])
    return found


BUILTIN = load_certificates([KEYS / "builtin-trusted.pem"])


class Machine:
    """Keyrings, and what they published last."""

    def __init__(self, kernel: str = "linux-7.3", *, unsealed: bool = False, **keyrings: Any) -> None:
        self.trusted = Keyrings()
        boot = Keyrings(builtin=BUILTIN, **keyrings)
        self.keyrings = SystemKeyrings(PROFILES[kernel], boot, self._publish, unsealed)

    def _publish(self, trusted: Keyrings) -> None:
        self.trusted = trusted

    def serial(self, name: str) -> int:
        (found,) = [key.serial for key in self.keyrings if isinstance(key, SystemKeyring) and key.name == name]
        return found

    def add(self, ring: str, name: str, *, description: bytes = b"", is_root: bool = True) -> int:
        der = certificate(name).der
        return self.keyrings.add_key(self.serial(ring), b"asymmetric", description, der, is_root=is_root)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(KernelError) as caught:
        action()
    return caught.value.name


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ("linux-6.12", {".builtin_trusted_keys", ".secondary_trusted_keys", ".fs-verity"}),
        ("linux-7.3", {".builtin_trusted_keys", ".secondary_trusted_keys", ".fs-verity", ".dm-verity"}),
        ("op-policy", {".builtin_trusted_keys", ".secondary_trusted_keys", ".fs-verity", ".dm-verity", ".ipe"}),
    ],
)
def test_the_keyrings_of_a_kernel(kernel: str, names: set[str]) -> None:
    assert {key.name for key in Machine(kernel).keyrings if isinstance(key, SystemKeyring)} == names
    with_platform = Machine(kernel, platform=load_certificates([KEYS / "plat.pem"]))
    assert with_platform.serial(".platform")


def test_the_secondary_keyring_takes_what_a_trusted_key_has_signed() -> None:
    machine = Machine()
    machine.add(".secondary_trusted_keys", "leaf")
    assert certificate("leaf") in machine.trusted.secondary.certificates
    assert refused(lambda: machine.add(".secondary_trusted_keys", "untrusted")) == "ENOKEY"
    assert certificate("untrusted") not in machine.trusted.secondary.certificates


@pytest.mark.parametrize("ring", [".builtin_trusted_keys", ".platform"])
def test_nothing_is_added_to_what_the_kernel_came_with(ring: str) -> None:
    machine = Machine(platform=load_certificates([KEYS / "plat.pem"]))
    assert refused(lambda: machine.add(ring, "leaf")) == "EACCES"


def test_only_root_adds() -> None:
    machine = Machine()
    assert refused(lambda: machine.add(".fs-verity", "untrusted", is_root=False)) == "EACCES"
    machine.add(".fs-verity", "untrusted")
    assert machine.trusted.fsverity.certificates == (certificate("untrusted"),)


def test_a_closed_keyring_takes_nothing_and_cannot_be_opened() -> None:
    machine = Machine()
    machine.add(".fs-verity", "trusted")
    ring = machine.serial(".fs-verity")
    machine.keyrings.restrict_keyring(ring, None, b"", is_root=True)
    assert refused(lambda: machine.add(".fs-verity", "ec")) == "EPERM"
    assert refused(lambda: machine.keyrings.restrict_keyring(ring, None, b"", is_root=True)) == "EEXIST"
    assert machine.trusted.fsverity.certificates == (certificate("trusted"),)


def test_a_restriction_by_name() -> None:
    machine = Machine()
    ring = machine.serial(".fs-verity")
    assert refused(lambda: machine.keyrings.restrict_keyring(ring, b"asymmetric", b"none", is_root=True)) == "EINVAL"
    machine.keyrings.restrict_keyring(ring, b"asymmetric", b"builtin_trusted", is_root=True)
    assert refused(lambda: machine.add(".fs-verity", "untrusted")) == "ENOKEY"
    machine.add(".fs-verity", "leaf")
    secondary = machine.serial(".secondary_trusted_keys")
    assert refused(lambda: machine.keyrings.restrict_keyring(secondary, None, b"", is_root=True)) == "EACCES"


def test_dm_veritys_keyring_is_closed_at_boot() -> None:
    assert refused(lambda: Machine().add(".dm-verity", "trusted")) == "EPERM"


def test_dm_veritys_keyring_counts_once_it_is_closed() -> None:
    machine = Machine(unsealed=True)
    machine.add(".dm-verity", "untrusted")
    assert not machine.trusted.dm_verity
    machine.keyrings.restrict_keyring(machine.serial(".dm-verity"), None, b"", is_root=True)
    assert machine.trusted.dm_verity.certificates == (certificate("untrusted"),)


def test_the_keyring_of_op_policy_asks_before_it_takes() -> None:
    machine = Machine("op-policy")
    ring = machine.serial(".ipe")
    der = certificate("untrusted").der

    def deny() -> None:
        raise KernelError(13, "denied")

    assert machine.keyrings.is_ipe(ring)
    assert (
        refused(lambda: machine.keyrings.add_key(ring, b"asymmetric", b"", der, is_root=True, admit=deny)) == "EACCES"
    )
    assert not machine.trusted.ipe
    machine.keyrings.add_key(ring, b"asymmetric", b"", der, is_root=True, admit=lambda: None)
    assert machine.trusted.ipe.certificates == (certificate("untrusted"),)


def test_a_key_is_taken_out_again() -> None:
    machine = Machine()
    serial = machine.add(".fs-verity", "trusted")
    ring = machine.serial(".fs-verity")
    assert refused(lambda: machine.keyrings.unlink(ring, ring, is_root=True)) == "ENOENT"
    machine.keyrings.unlink(serial, ring, is_root=True)
    assert not machine.trusted.fsverity
    assert refused(lambda: machine.keyrings.unlink(serial, ring, is_root=True)) == "ENOKEY"


def test_the_same_description_replaces() -> None:
    machine = Machine()
    machine.add(".fs-verity", "trusted", description=b"mine")
    machine.add(".fs-verity", "ec", description=b"mine")
    assert machine.trusted.fsverity.certificates == (certificate("ec"),)
    machine.keyrings.clear(machine.serial(".fs-verity"), is_root=True)
    assert not machine.trusted.fsverity


@pytest.mark.parametrize(
    ("payload", "answer"),
    [(b"", "EINVAL"), (b"no certificate", "EBADMSG"), ((KEYS / "ec.pem").read_bytes(), "EBADMSG")],
)
def test_payloads_that_are_no_certificates(payload: bytes, answer: str) -> None:
    machine = Machine()
    ring = machine.serial(".fs-verity")
    assert refused(lambda: machine.keyrings.add_key(ring, b"asymmetric", b"", payload, is_root=True)) == answer


def test_a_blacklisted_certificate_enters_nowhere(tmp_path: Path) -> None:
    blacklisted = certificate("trusted").signature.digest
    assert blacklisted is not None
    machine = Machine(blacklist=frozenset({blacklisted}))
    assert refused(lambda: machine.add(".fs-verity", "trusted")) == "EKEYREJECTED"


def test_what_is_shown() -> None:
    machine = Machine("linux-6.12")
    keyrings = machine.keyrings
    ring = machine.serial(".secondary_trusted_keys")
    assert keyrings.describe(ring, is_root=True) == b"keyring;0;0;1f0f0000;.secondary_trusted_keys\0"
    assert refused(lambda: keyrings.describe(ring, is_root=False)) == "EACCES"
    serial = machine.add(".secondary_trusted_keys", "leaf")
    assert len(keyrings.read(ring, is_root=True)) == 8  # the builtin keyring and the new key
    assert refused(lambda: keyrings.read(serial, is_root=True)) == "EACCES"
    lines = keyrings.proc_keys().splitlines()
    assert any(line.endswith(b" keyring   .secondary_trusted_keys: 2") for line in lines)
    assert any(line.endswith(b" keyring   .fs-verity: empty") for line in lines)
    assert any(b" asymmetri " in line and b"X509.rsa" in line for line in lines)


def test_certificates_cannot_be_searched_for() -> None:
    machine = Machine()
    ring = machine.serial(".secondary_trusted_keys")
    known = certificate("trusted").description
    for description, answer in ((known, "EACCES"), (b"id:" + known[-8:], "EACCES"), (b"nobody", "ENOKEY")):
        search = functools.partial(machine.keyrings.search, ring, b"asymmetric", description, is_root=True)
        assert refused(search) == answer
    for name in (".builtin_trusted_keys", ".secondary_trusted_keys"):  # a search begins with the keyring itself
        found = machine.keyrings.search(ring, b"keyring", name.encode(), is_root=True)
        assert found == machine.serial(name)


def test_what_is_not_emulated_is_not_judged() -> None:
    machine = Machine()
    secondary = machine.serial(".secondary_trusted_keys")
    with pytest.raises(NotJudgedError):
        machine.keyrings.clear(secondary, is_root=True)
    with pytest.raises(NotJudgedError):
        machine.keyrings.unlink(machine.serial(".builtin_trusted_keys"), secondary, is_root=True)
    with pytest.raises(NotJudgedError):
        machine.keyrings.add_key(machine.serial(".fs-verity"), b"user", b"x", b"y", is_root=True)
