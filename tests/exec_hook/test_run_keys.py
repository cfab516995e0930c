"""The kernel's keyrings as scripts use them, by keyctl(1), as root and as a user without privileges."""

import os
from pathlib import Path

import pytest

from ipe_emu.keyring import load_certificates
from ipe_emu.pkcs7.sign import sign_policy
from tests.exec_hook.running import Runner, runner
from tests.vectors import KEYS

pytestmark = [pytest.mark.needs("fuse", "user-namespaces"), pytest.mark.timeout(100)]

POLICY = b"policy_name=Theirs policy_version=1.0.0\nDEFAULT action=ALLOW\n"
LOAD = "cat theirs.p7b >/sys/kernel/security/ipe/new_policy"


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    emu = runner(tmp_path, plain_user=request.param == "plain-user")
    key, certificate = ((KEYS / f"untrusted.{suffix}").read_bytes() for suffix in ("key", "pem"))
    (tmp_path / "theirs.p7b").write_bytes(sign_policy(POLICY, key, certificate))
    (parsed,) = load_certificates([KEYS / "untrusted.pem"])
    (tmp_path / "theirs.der").write_bytes(parsed.der)
    return emu


def test_a_certificate_of_nobody_enters_no_keyring_that_policies_are_verified_with(emu: Runner) -> None:
    script = f"keyctl padd asymmetric '' %:.secondary_trusted_keys <theirs.der; {LOAD}; keyctl show %:.fs-verity"
    done = emu.shell(script, "--kernel", "linux-7.3", *emu.with_policy())
    assert done.stderr.count("Required key not available") == 2, done.stderr
    assert "keyring: .fs-verity" in done.stdout


def test_the_keyring_of_op_policy_takes_one_and_is_closed(emu: Runner) -> None:
    script = f"""
        keyctl padd asymmetric '' %:.ipe <theirs.der >added && keyctl describe "$(cat added)" &&
        keyctl restrict_keyring %:.ipe && {LOAD} && keyctl list %:.ipe &&
        ! keyctl padd asymmetric other %:.ipe <theirs.der && ls /sys/kernel/security/ipe/policies
    """
    done = emu.shell(script, *emu.with_policy())
    assert done.returncode == 0, done.stderr
    assert "1 key in keyring" in done.stdout
    assert "Theirs" in done.stdout
    assert "Operation not permitted" in done.stderr
    assert "entered the keyring .ipe" in done.stderr


def test_ones_own_keys_are_shown_too(emu: Runner) -> None:
    done = emu.shell("keyctl newring mine @s >/dev/null; busybox cat /proc/keys", *emu.with_policy())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == sorted(lines)
    assert {"mine:", ".builtin_trusted_keys:", ".secondary_trusted_keys:"} <= {line.split()[8] for line in lines}


@pytest.mark.parametrize(("parameter", "status"), [("dm_verity.keyring_unsealed=1", 0), ("quiet", 1)])
def test_dm_veritys_keyring_is_open_if_the_command_line_says_so(emu: Runner, parameter: str, status: int) -> None:
    script = "keyctl padd asymmetric '' %:.dm-verity <theirs.der"
    assert emu.shell(script, "--cmdline", parameter, *emu.with_policy()).returncode == status
