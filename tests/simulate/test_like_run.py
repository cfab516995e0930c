"""What is said of every file of a tree, against what happens to it under ``ipe-emu run`` with the same policy."""

import base64
import json
import os
import sys
from pathlib import Path

import pytest

from ipe_emu.simulate.judge import Outcome
from tests.cli.conftest import spawn
from tests.simulate.cases import ALLOW, DENY, DISTRUSTED, argv_for, expected, facts_file, judged
from tests.simulate.trees import build

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(120)]

# Executes what it is given in the tree, each in a process of its own, and says how that ends.
DRIVER = """
import base64, json, os, subprocess, sys
subprocess.run(["mount", "--bind", "/proc", sys.argv[1] + "/proc"], check=True)  # $ORIGIN is found by /proc/self/exe
root, jobs = sys.argv[1], json.load(open(sys.argv[2]))
ends = []
for argv in jobs:
    argv = [base64.b64decode(word) for word in argv]
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.chroot(root)
            os.chdir("/")
            null = os.open("/tmp/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execv(argv[0], argv)
        except OSError as error:
            os.write(write, b"%d" % error.errno)
        os._exit(99)
    os.close(write)
    refused = os.read(read, 16)
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    ends.append(["errno", int(refused)] if refused else ["status", os.waitstatus_to_exitcode(status)])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "root"
    build(root)
    (root / "tmp/null").touch()
    return root


def compare(root: Path, place: Path, policy: bytes, facts: Path, *allowed: str) -> dict[Outcome, int]:
    """Judge the tree, execute all of it under `run`, and compare; returns how many there were of each outcome."""
    judgements = judged(root, policy, facts)
    (place / "policy.pol").write_bytes(policy)
    (place / "driver.py").write_text(DRIVER)
    argvs = [[base64.b64encode(word).decode() for word in argv_for(found)] for found in judgements]
    (place / "jobs.json").write_text(json.dumps(argvs))
    done = spawn(
        "run", "--boot-policy", place / "policy.pol", "--integrity", facts, *allowed,
        "--", sys.executable, "-I", place / "driver.py", root, place / "jobs.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    differences = {
        os.fsdecode(found.path): (found.outcome, found.answer, found.reason, end)
        for found, end in zip(judgements, ends, strict=True)
        if end != expected(found)
    }
    assert not differences
    outcomes = [found.outcome for found in judgements]
    return {outcome: outcomes.count(outcome) for outcome in outcomes}


def interpreter_of_tests() -> tuple[str, ...]:
    """Let what runs the tests run: python, and what it needs."""
    return tuple(word for path in {"/usr", sys.base_prefix} for word in ("--boot-verified", path))


@pytest.mark.parametrize("case", DISTRUSTED)
def test_trusted_but_for(root: Path, tmp_path: Path, case: str) -> None:
    facts = facts_file(tmp_path / "facts.toml", root, DISTRUSTED[case], others=True)
    outcomes = compare(root, tmp_path, DENY, facts, *interpreter_of_tests())
    assert outcomes[Outcome.RUNS] > 3


@pytest.mark.parametrize("case", DISTRUSTED)
def test_allowed_by_default_but_for(root: Path, tmp_path: Path, case: str) -> None:
    facts = facts_file(tmp_path / "facts.toml", root, DISTRUSTED[case], others=None)
    assert compare(root, tmp_path, ALLOW, facts)[Outcome.RUNS] > 3
