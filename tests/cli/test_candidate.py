"""policy from: the policy it writes lets run what it was written for, and nothing else; and verity scan."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ipe_emu.policy.lint import MAX_SIGNED, SIGNATURE_BYTES
from ipe_emu.policy.parse import parse_policy
from tests.cli.conftest import Run
from tests.simulate.trees import build


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "root"
    build(root)
    return root


def outcomes(out: str) -> dict[str, str]:
    return {found["path"]: found["outcome"] for found in json.loads(out)["files"]}


@pytest.mark.needs("busybox")
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_what_it_is_written_for_runs_and_a_changed_file_does_not(
    ipe_emu: Run, root: Path, tmp_path: Path, algorithm: str
) -> None:
    policy, changed = tmp_path / "candidate.pol", root / "bin/static"
    written = ipe_emu("policy", "from", "--hash-alg", algorithm, "--comments", "-o", policy, root)
    assert (written.status, written.out) == (0, "")
    parse_policy(policy.read_bytes())
    simulate = ("policy", "simulate", "--json", "--policy", policy, root)
    with_it = outcomes(ipe_emu(*simulate, "--fsverity", algorithm).out)
    everything = tmp_path / "all.pol"
    everything.write_text("policy_name=All policy_version=1.0.0\nDEFAULT action=ALLOW\n")
    allowed = outcomes(ipe_emu("policy", "simulate", "--json", "--policy", everything, root).out)
    # Anonymous memory, which a library with an executable stack wants, is no file and has no rule.
    assert {path for path in allowed if allowed[path] != with_it[path]} == {"/bin/stack"}
    assert {outcome for path, outcome in outcomes(ipe_emu(*simulate).out).items() if "libdata" not in path} == {
        "denied"
    }
    content = changed.read_bytes()
    try:
        changed.write_bytes(content + b"\0")
        assert outcomes(ipe_emu(*simulate, "--fsverity", algorithm).out)["/bin/static"] == "denied"
    finally:
        changed.write_bytes(content)


def script(path: Path, number: int) -> None:
    path.write_text(f"#!/bin/sh\n# {number}\n")
    path.chmod(0o755)


def test_the_limit_of_a_signed_policy_is_told_to_the_byte(ipe_emu: Run, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    script(tree / "0", 0)
    one = len(ipe_emu("policy", "from", tree).out)
    script(tree / "1", 1)
    rule = len(ipe_emu("policy", "from", tree).out) - one
    most = 1 + (MAX_SIGNED - SIGNATURE_BYTES - one) // rule
    for number in range(most):
        script(tree / str(number), number)
    fits = ipe_emu("policy", "from", tree)
    assert (fits.status, len(fits.out)) == (0, one + rule * (most - 1))
    script(tree / "one more", most)
    done = ipe_emu("policy", "from", tree)
    assert done.status == 1
    assert len(parse_policy(done.out.encode()).rules) == most + 1
    assert "EMSGSIZE" in done.err
    assert "dm-verity volume" in done.err


def test_modules_and_copies_have_their_rules(ipe_emu: Run, root: Path) -> None:
    report = json.loads(ipe_emu("policy", "from", "--json", root).out)
    rules = {(rule["operation"], rule["path"]) for rule in report["rules"]}
    assert ("KMODULE", "/lib/modules/x.ko") in rules
    assert ("EXECUTE", "/lib/x86_64-linux-gnu/libdefault.so") in rules
    assert ("EXECUTE", "/bin/latin-\\xe9") in rules
    assert not [path for _, path in rules if "bin/not-executable" in path or "libdata" in path]
    assert len({rule["property"] for rule in report["rules"]}) == len(report["rules"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "a b"), "policy_name"),
        (("--name", "a/b"), "a/b"),
        (("--policy-version", "1.0"), "--policy-version is '1.0'"),
        (("--policy-version", "1.0.70000"), "at most 65535"),
    ],
)
def test_bad_options(ipe_emu: Run, root: Path, options: tuple[str, ...], message: str) -> None:
    done = ipe_emu("policy", "from", *options, root)
    assert (done.status, done.out) == (2, "")
    assert message in done.err


def test_an_empty_tree_gives_no_policy(ipe_emu: Run, tmp_path: Path) -> None:
    done = ipe_emu("policy", "from", tmp_path)
    assert (done.status, done.out) == (4, "")


def test_scan_gives_the_digests_that_fsverity_gives(ipe_emu: Run, root: Path) -> None:
    done = ipe_emu("verity", "scan", "--json", "--boot-verified", root / "bin", root)
    assert done.status == 0
    files = {found["path"]: found for found in json.loads(done.out)["files"]}
    assert files["/bin/static"]["known"] == ["boot_verified"]
    assert files["/lib/modules/x.ko"] | {"digest": "", "size": 0} == {
        "path": "/lib/modules/x.ko", "kind": "module", "size": 0, "digest": "", "sealed": None, "known": [],
    }  # fmt: skip
    for path in ("/bin/static", "/bin/empty", "/lib/modules/x.ko"):
        digest = subprocess.run(
            ["fsverity", "digest", root / path[1:]], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()[0]
        assert files[path]["digest"] == digest
    assert "/etc/ld.so.conf" not in files
    everything = ipe_emu("verity", "scan", "--all", root)
    assert [
        line for line in everything.out.splitlines() if line.startswith("file ") and line.endswith("/etc/ld.so.conf")
    ]


@pytest.mark.parametrize("what", ["nothing", "a file"])
def test_scan_of_what_is_no_directory(ipe_emu: Run, tmp_path: Path, what: str) -> None:
    (tmp_path / "a file").touch()
    done = ipe_emu("verity", "scan", tmp_path / what)
    assert done.status == 2
    assert os.fspath(tmp_path / what) in done.err
