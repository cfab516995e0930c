"""keys new, policy sign, and the check of what was signed."""

import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.vectors import KEYS

TEXT = "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "a.pol"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("kind", ["rsa2048", "ec-p256"])
def test_a_new_key_signs_what_its_certificate_verifies(ipe_emu: Run, policy: Path, tmp_path: Path, kind: str) -> None:
    assert ipe_emu("keys", "new", "--kind", kind, tmp_path / "k").status == 0
    assert stat.S_IMODE((tmp_path / "k.key").stat().st_mode) == 0o600
    signed = ipe_emu("policy", "sign", "--key", tmp_path / "k.key", "--cert", tmp_path / "k.pem", policy)
    assert signed.status == 0, signed.err
    verified = ipe_emu("policy", "check", "--builtin-keys", tmp_path / "k.pem", tmp_path / "a.p7b")
    assert verified.status == 0
    assert "signature verified" in verified.out


def test_without_keys_it_says_that_nothing_was_verified(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "trusted.key", "--cert", KEYS / "trusted.pem", policy)
    result = ipe_emu("policy", "check", tmp_path / "a.p7b")
    assert result.status == 0
    assert "signature not verified" in result.out
    report = json.loads(ipe_emu("policy", "check", "--json", tmp_path / "a.p7b").out)
    assert report["files"][0]["signature"] == "not verified"
    assert ipe_emu("policy", "show", tmp_path / "a.p7b").out == TEXT


def test_a_stranger_is_refused_with_the_kernels_errno(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "untrusted.key", "--cert", KEYS / "untrusted.pem", policy)
    result = ipe_emu("policy", "check", "--builtin-keys", KEYS / "trusted.pem", tmp_path / "a.p7b")
    assert result.status == 2
    assert "ENOKEY" in result.out


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b[:60] + b"\0" + b[61:]])
def test_damaged_signed_policies_are_errors_and_never_text(
    ipe_emu: Run, policy: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "trusted.key", "--cert", KEYS / "trusted.pem", policy)
    (tmp_path / "bad.p7b").write_bytes(damage((tmp_path / "a.p7b").read_bytes()))
    result = ipe_emu("policy", "check", "--builtin-keys", KEYS / "trusted.pem", tmp_path / "bad.p7b")
    assert result.status == 2
    assert "error: " in result.out
    assert "Traceback" not in result.err


def test_openssl_reads_what_we_sign(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "trusted.key", "--cert", KEYS / "trusted.pem", policy)
    signed = str(tmp_path / "a.p7b")
    verify = ["openssl", "smime", "-verify", "-inform", "der", "-in", signed, "-noverify", "-binary"]
    assert subprocess.run(verify, capture_output=True, check=True, timeout=60).stdout == TEXT.encode()


def test_nothing_is_overwritten_unasked(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "k.pem").write_text("precious")
    refused = ipe_emu("keys", "new", tmp_path / "k")
    assert refused.status == 2
    assert "k.pem: exists" in refused.err
    assert not (tmp_path / "k.key").exists()  # both or neither
    assert ipe_emu("keys", "new", "--force", tmp_path / "k").status == 0
    (tmp_path / "a.p7b").write_text("precious")
    sign = ("policy", "sign", "--key", tmp_path / "k.key", "--cert", tmp_path / "k.pem", policy)
    assert ipe_emu(*sign).status == 2
    assert (tmp_path / "a.p7b").read_text() == "precious"
    assert ipe_emu(*sign, "--force").status == 0


def test_force_replaces_a_file_and_follows_no_link(ipe_emu: Run, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "k.key").symlink_to("victim")
    result = ipe_emu("keys", "new", "--force", tmp_path / "k")
    assert result.status == 2
    assert "no regular file" in result.err
    assert (tmp_path / "victim").read_text() == "precious"


def test_sign_refuses_what_a_kernel_would_not_take(ipe_emu: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.pol").write_text("policy_name=a policy_version=1.0.0\n")
    keys = ("--key", KEYS / "trusted.key", "--cert", KEYS / "trusted.pem")
    result = ipe_emu("policy", "sign", *keys, tmp_path / "bad.pol")
    assert result.status == 2
    assert not (tmp_path / "bad.p7b").exists()
    assert ipe_emu("policy", "sign", *keys, "--force", tmp_path / "bad.pol").status == 0


def test_sign_refuses_keys_that_do_not_belong_together(ipe_emu: Run, policy: Path) -> None:
    result = ipe_emu("policy", "sign", "--key", KEYS / "trusted.key", "--cert", KEYS / "ec.pem", policy)
    assert result.status == 2
    assert "does not belong" in result.err


@pytest.mark.parametrize(("key", "cert"), [("boot-policy.pol", "trusted.pem"), ("trusted.key", "trusted.key")])
def test_sign_with_what_is_no_key(ipe_emu: Run, policy: Path, key: str, cert: str) -> None:
    find = {path.name: path for path in (*KEYS.iterdir(), KEYS.parent / "boot-policy.pol")}
    result = ipe_emu("policy", "sign", "--key", find[key], "--cert", find[cert], policy)
    assert result.status == 2
    assert "Traceback" not in result.err


def test_the_dm_verity_keyring_is_unknown_to_old_kernels(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "trusted.key", "--cert", KEYS / "trusted.pem", policy)
    keys = ("--builtin-keys", KEYS / "trusted.pem", "--dm-verity-keys", KEYS / "ec.pem", tmp_path / "a.p7b")
    old = ipe_emu("policy", "check", "--kernel", "linux-6.12", *keys)
    assert old.status == 2
    assert "--dm-verity-keys: linux-6.12 has no such keyring" in old.out
    assert ipe_emu("policy", "check", "--kernel", "linux-7.3", *keys).status == 0


def test_a_secondary_key_that_nobody_vouches_for_is_warned_of(ipe_emu: Run, policy: Path, tmp_path: Path) -> None:
    ipe_emu("policy", "sign", "--key", KEYS / "ca.key", "--cert", KEYS / "ca.pem", policy)
    options = ("--builtin-keys", KEYS / "ca.pem", "--secondary-keys")
    warned = ipe_emu("policy", "check", *options, KEYS / "untrusted.pem", tmp_path / "a.p7b")
    vouched = ipe_emu("policy", "check", *options, KEYS / "leaf.pem", tmp_path / "a.p7b")
    assert (warned.status, vouched.status) == (0, 0)
    assert "IPE oracle untrusted" in warned.err
    assert "warning: --secondary-keys" not in vouched.err
