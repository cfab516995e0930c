"""add_key(2) and keyctl(2) of a rehearsed process, on the kernel's keyrings and on its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.keyctl import Keyctl
from ipe_emu.exec_hook.plan import Perform, Plan
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.integrity.facts import Facts
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.system_keyrings import SystemKeyring
from tests.exec_hook.tracee_harness import Rehearsal, model
from tests.vectors import KEYS

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

(LEAF,) = load_certificates([KEYS / "leaf.pem"])
(UNTRUSTED,) = load_certificates([KEYS / "untrusted.pem"])
ADMITS = "DEFAULT action=ALLOW\nDEFAULT op=POLICY action=DENY\nop=POLICY boot_verified=TRUE action=ALLOW\n"

THREAD, PROCESS, SESSION = -1, -2, -3
DESCRIBE, UNLINK, READ, RESTRICT = 6, 9, 11, 29

VALUE = """
def value(*args):
    try:
        return {"ok": call(*args)}
    except OSError as error:
        return {"error": errno_name(error.errno)}
"""
ADD = VALUE + "result = value('add_key', kind, description, payload, len(payload), ring)"


@define(eq=False)
class Machine:
    """Keyrings, with a rehearsal that uses them."""

    inside: Rehearsal
    keyctl: Keyctl

    @property
    def trusted(self) -> Keyrings:
        return self.keyctl.ipe.keyrings

    def ring(self, name: str) -> int:
        (found,) = [key.serial for key in self.keyctl.keyrings if isinstance(key, SystemKeyring) and key.name == name]
        return found

    def add(self, ring: int, payload: bytes, kind: bytes = b"asymmetric", description: bytes = b"") -> Any:
        return self.inside.run(ADD, kind=kind, description=description, payload=payload, ring=ring)

    def call(self, *args: Any) -> Any:
        return self.inside.run(VALUE + "result = value('keyctl', *args)", args=list(args))


@define(eq=False)
class Finder:
    """Answers request_key("user", "sig") with the length of what a kernel would find from within, 0 for nothing."""

    keyctl: Keyctl

    def plan(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        found = self.keyctl.session_keys.find(caller, b"user", b"sig")
        return Plan(Perform(lambda: len(found or b"")))


FIND = VALUE + "result = value('request_key', b'user', b'sig', None, 0)"


@pytest.fixture
def machine(tree: Path, tmp_path: Path) -> Iterator[Machine]:
    ipe = model(ADMITS, lambda _: None, kernel="op-policy")
    ipe.trust(Keyrings(builtin=load_certificates([KEYS / "builtin-trusted.pem"])))
    keyctl = Keyctl()
    keyctl.begin(ipe, os.getuid())
    traps = (*keyctl.traps, Trap("request_key", Finder(keyctl).plan))
    with Rehearsal(tmp_path / "root", tree, traps=traps) as inside:
        yield Machine(inside, keyctl)


def test_certificates_are_added(machine: Machine) -> None:
    added = machine.add(machine.ring(".secondary_trusted_keys"), LEAF.der)
    assert machine.trusted.secondary.certificates == (LEAF,)
    assert machine.call(DESCRIBE, added["ok"], None, 0)["ok"] > 20
    assert machine.add(machine.ring(".secondary_trusted_keys"), UNTRUSTED.der) == {"error": "ENOKEY"}
    assert machine.add(machine.ring(".builtin_trusted_keys"), LEAF.der) == {"error": "EACCES"}
    assert machine.add(machine.ring(".fs-verity"), b"junk") == {"error": "EBADMSG"}


def test_a_keyring_is_read_and_described(machine: Machine) -> None:
    ring = machine.ring(".fs-verity")
    added = machine.add(ring, UNTRUSTED.der)["ok"]
    source = """
        buffer = (ctypes.c_char * 64)()
        length = call("keyctl", operation, ring, buffer, 64)
        result = [length, list(buffer.raw)]
    """
    length, content = machine.inside.run(source, operation=READ, ring=ring)
    assert length == 4
    assert int.from_bytes(bytes(content[:4]), "little") == added
    length, content = machine.inside.run(source, operation=DESCRIBE, ring=ring)
    assert bytes(content[:length]) == b"keyring;0;0;082f0000;.fs-verity\0"


def test_a_keyring_is_closed(machine: Machine) -> None:
    ring = machine.ring(".fs-verity")
    assert machine.call(RESTRICT, ring, b"asymmetric", None) == {"error": "EINVAL"}
    assert machine.call(RESTRICT, ring, None, None) == {"ok": 0}
    assert machine.add(ring, UNTRUSTED.der) == {"error": "EPERM"}
    assert machine.call(RESTRICT, ring, None, None) == {"error": "EEXIST"}


def test_keys_are_unlinked(machine: Machine) -> None:
    ring = machine.ring(".fs-verity")
    added = machine.add(ring, UNTRUSTED.der)["ok"]
    assert machine.call(UNLINK, added, SESSION) == {"error": "ENOENT"}
    assert machine.call(UNLINK, added, ring) == {"ok": 0}
    assert not machine.trusted.fsverity


def test_the_keyring_ipe_asks_op_policy_of_the_program(machine: Machine) -> None:
    ring = machine.ring(".ipe")
    assert machine.add(ring, UNTRUSTED.der) == {"error": "EACCES"}
    device = Path(f"/proc/{machine.inside.pid}/exe").stat().st_dev
    machine.inside.facts.devices[device] = Facts(boot_verified=True)
    assert "ok" in machine.add(ring, UNTRUSTED.der)
    assert machine.trusted.ipe.certificates == (UNTRUSTED,)
    assert "there is no such keyring" in machine.keyctl.ipe.upstream_refusals[0].answer


def test_unknown_operations_on_the_kernels_keys_are_not_judged(machine: Machine) -> None:
    revoke = 3
    assert machine.call(revoke, machine.ring(".fs-verity")) == {"error": "EPERM"}
    ((call, reason),) = machine.inside.notes.unjudged
    assert call == "keyctl"
    assert "REVOKE" in reason


def test_a_key_of_ones_own_is_found_in_ones_own_keyrings_alone(machine: Machine) -> None:
    payload = b"x" * 77
    assert "ok" in machine.add(THREAD, payload, b"user", b"sig")
    assert machine.inside.run(FIND) == {"ok": 77}
    child = "result = run(lambda: os._exit(0 if call('request_key', b'user', b'sig', None, 0) == 0 else 1))"
    assert machine.inside.run(child) == {"exit": 0}


def test_a_key_that_may_have_been_taken_away_is_not_found(machine: Machine) -> None:
    added = machine.add(PROCESS, b"signature", b"user", b"sig")["ok"]
    assert machine.call(UNLINK, added, PROCESS) == {"ok": 0}
    assert machine.inside.run(FIND) == {"ok": 0}


def test_a_sessions_key_is_not_judged(machine: Machine) -> None:
    assert "ok" in machine.add(SESSION, b"signature", b"user", b"sig")
    assert machine.inside.run(FIND) == {"error": "EPERM"}
    assert "keyring" in machine.inside.notes.unjudged[0][1]
