"""What is trusted of the tree of ``trees.build``, what is then said of its files, and how that can be seen."""

import errno
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

from ipe_emu.integrity import declared
from ipe_emu.linux import mountinfo
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.simulate.judge import Judge, Judgement, Kind, Outcome
from ipe_emu.simulate.known import Known
from ipe_emu.simulate.tree import open_tree

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

#: Without arguments they end with an error of their own.
SKIPPED = frozenset({b"/bin/map", b"/bin/load"})


def facts_file(path: Path, root: Path, declared_so: Collection[str], others: bool | None) -> Path:
    """Declare files below the root as boot_verified, or (``others``) all but those."""
    tables = [] if others is None else [(root, others)]
    tables += [(root / name, others is None) for name in declared_so]
    text = "".join(f'[[file]]\npath = "{where}"\nboot_verified = {str(value).lower()}\n' for where, value in tables)
    path.write_text(text)
    return path


def judged(root: Path, policy: bytes, facts: Path) -> list[Judgement]:
    """Judge what can be seen of the tree."""
    with open_tree(str(root)) as tree:
        judge = Judge(RuleIndex(parse_policy(policy)), Known(tree, declared.load(mountinfo.locate, [facts])))
        found = [judgement for file in tree.walk() if (judgement := judge.judge(file)) is not None]
    # Nobody asks about a library without an executable segment, and `map` makes one of it.
    found = [judgement for judgement in found if judgement.path not in SKIPPED and judgement.asked]
    assert not [judgement for judgement in found if judgement.outcome is Outcome.NOT_JUDGED]
    return found


def argv_for(judgement: Judgement) -> list[bytes]:
    """How it is found out what becomes of a file."""
    if judgement.kind is Kind.LIBRARY:
        return [b"/bin/map", judgement.path]
    if judgement.kind is Kind.MODULE:
        return [b"/bin/load", judgement.path]
    return [judgement.path]


def expected(judgement: Judgement) -> Sequence[object]:
    """Return what whoever executes it sees if the judgement is right: an errno or a status, negative for a signal."""
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
