"""What is said of every file of a tree, against what happens to it under ``ipe-emu run`` with the same policy."""

import base64
import errno
import json
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from ipe_emu.integrity import declared
from ipe_emu.linux import mountinfo
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.simulate.judge import Judge, Judgement, Kind, Outcome
from ipe_emu.simulate.known import Known
from ipe_emu.simulate.tree import open_tree
from tests.cli.conftest import spawn
from tests.simulate.trees import build

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(120)]

DENY = b"""policy_name=Trusted policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=KMODULE boot_verified=TRUE action=ALLOW
"""
# The other way round: what is declared is denied, and anonymous memory may be executed.
ALLOW = b"""policy_name=Distrusted policy_version=1.0.0
DEFAULT action=ALLOW
op=EXECUTE boot_verified=TRUE action=DENY
op=KMODULE boot_verified=TRUE action=DENY
"""
LIBRARY = "lib/x86_64-linux-gnu/"
#: What is not trusted, by the name of the case; the rest of the tree is.
DISTRUSTED: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "ld.so": ("lib64/ld-2.so",),
    "libc": (LIBRARY + "libc.so.6",),
    "libraries": (
        "opt/own/lib/libown.so", "opt/own/lib/libleaf.so", "opt/cached/libcached.so", LIBRARY + "libdata.so",
        LIBRARY + "libtwo.so", "opt/path/libpath.so", LIBRARY + "glibc-hwcaps/x86-64-v2/libcpu.so",
    ),
    "interpreters": ("bin/busybox", "bin/script", "bin/d3"),
    "programs": ("bin/static", "bin/dynamic", "bin/text", "bin/empty", "bin/no-linker", "lib/modules/x.ko"),
}  # fmt: skip

#: Without arguments it ends with an error of its own.
SKIPPED = frozenset({b"/bin/map", b"/bin/load"})

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


def facts_file(path: Path, root: Path, declared_so: Collection[str], others: bool | None) -> Path:
    """Declare files below the root as boot_verified, or (``others``) all but those."""
    tables = [] if others is None else [(root, others)]
    tables += [(root / name, others is None) for name in declared_so]
    text = "".join(f'[[file]]\npath = "{where}"\nboot_verified = {str(value).lower()}\n' for where, value in tables)
    path.write_text(text)
    return path


def judged(root: Path, policy: bytes, facts: Path) -> list[Judgement]:
    with open_tree(str(root)) as tree:
        judge = Judge(RuleIndex(parse_policy(policy)), Known(tree, declared.load(mountinfo.locate, [facts])))
        return [judgement for found in tree.walk() if (judgement := judge.judge(found)) is not None]


def argv_for(judgement: Judgement) -> list[bytes]:
    """How it is found out what becomes of a file."""
    if judgement.kind is Kind.LIBRARY:
        return [b"/bin/map", judgement.path]
    if judgement.kind is Kind.MODULE:
        return [b"/bin/load", judgement.path]
    return [judgement.path]


def expected(judgement: Judgement) -> Sequence[object]:
    """What `DRIVER` sees if the judgement is right."""
    match judgement.outcome, judgement.kind:
        case Outcome.RUNS, _:
            return ["status", 0]
        case Outcome.DENIED, (Kind.LIBRARY | Kind.MODULE):
            return ["status", 1]
        case Outcome.KILLED, _:
            return ["status", -signal.SIGSEGV]
        case ((Outcome.LIBRARY_DENIED | Outcome.LIBRARY_MISSING), _):
            return ["status", 127]
    return ["errno", getattr(errno, judgement.answer)]


def compare(root: Path, place: Path, policy: bytes, facts: Path, *allowed: str) -> dict[Outcome, int]:
    """Judge the tree, execute all of it under `run`, and compare; returns how many there were of each outcome."""
    # Nobody asks about a library without an executable segment, and `map` makes one of it.
    judgements = [found for found in judged(root, policy, facts) if found.path not in SKIPPED and found.asked]
    assert not [found for found in judgements if found.outcome is Outcome.NOT_JUDGED]
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
