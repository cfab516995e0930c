"""Trees that are out to mislead, to hang or to exhaust whoever looks at them."""

import lzma
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.integrity.declared import Declared
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.simulate.judge import Judge, Judgement, Kind, Outcome
from ipe_emu.simulate.known import Known, Seals
from ipe_emu.simulate.tree import Found, Tree, Unreadable, open_tree
from tests.simulate.trees import Compiler

ALLOW = "DEFAULT action=ALLOW\n"
DENY = "DEFAULT action=DENY\n"
#: An ELF header of this machine: type, entry, program headers at, section headers at, sizes and numbers.
HEADER = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def tree(root: Path) -> Iterator[Tree]:
    with open_tree(str(root)) as tree:
        yield tree


def judged(tree: Tree, rules: str = ALLOW, seals: Seals | None = None, **options: bool) -> dict[bytes, Judgement]:
    policy = parse_policy(f"policy_name=t policy_version=1.0.0\n{rules}".encode())
    judge = Judge(RuleIndex(policy), Known(tree, Declared(()), seals), **options)
    found = [judgement for file in tree.walk() if (judgement := judge.judge(file)) is not None]
    return {judgement.path: judgement for judgement in found}


def executable(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def header(kind: int, *, machine: int = 62, phoff: int = 64, phnum: int = 1, shoff: int = 0, shnum: int = 0) -> bytes:
    return HEADER.pack(b"\x7fELF", 2, 1, 1, kind, machine, 1, 0, phoff, shoff, 0, 64, 56, phnum, 64, shnum, 0)


def test_only_regular_files_are_opened_and_each_once(root: Path, tree: Tree) -> None:
    (root / "sub").mkdir()
    executable(root / "sub/program", b"#!/none\n")
    (root / "link").symlink_to("sub/program")
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to("../..")
    (root / "hard").hardlink_to(root / "sub/program")
    os.mkfifo(root / "fifo", 0o755)  # opening it would wait for ever
    names = [found.path for found in tree.walk()]
    assert names == [b"/hard"]


def test_names_are_bytes(root: Path, tree: Tree) -> None:
    name = b"new\nline-\xe9"
    executable(Path(os.fsdecode(os.fsencode(root) + b"/" + name)), b"#!/none\n")
    assert list(judged(tree)) == [b"/" + name]


def test_what_vanishes_was_not_there(root: Path, tree: Tree) -> None:
    for name in ("a", "b", "d/e"):
        (root / name).parent.mkdir(exist_ok=True)
        executable(root / name, b"#!/none\n")
    walk = tree.walk()
    assert isinstance(next(walk), Found)
    (root / "b").unlink()
    (root / "d/e").unlink()
    (root / "d").rmdir()
    assert list(walk) == []


def test_a_directory_that_becomes_a_link_leads_nowhere(root: Path, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    executable(tmp_path / "outside/program", b"#!/none\n")
    executable(root / "a", b"#!/none\n")
    (root / "d").mkdir()
    walk = tree.walk()
    next(walk)
    (root / "d").rmdir()
    (root / "d").symlink_to(tmp_path / "outside")
    assert [type(found) for found in walk] == [Unreadable]


@pytest.mark.parametrize(
    ("interpreter", "outcome"),
    [
        ("/up/up/up/bin/sh", Outcome.INTERPRETER_MISSING),  # links that climb end at the root of the tree
        ("/../../../../bin/sh", Outcome.INTERPRETER_MISSING),
        ("/loop", Outcome.FAILS),
        ("/fifo", Outcome.FAILS),
        ("relative", Outcome.NOT_JUDGED),
        ("/" + "a/" * 100, Outcome.INTERPRETER_MISSING),
    ],
)
def test_interpreters_are_looked_for_in_the_tree_alone(
    root: Path, tree: Tree, interpreter: str, outcome: Outcome
) -> None:
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo", 0o755)
    executable(root / "script", f"#!{interpreter}\n".encode())
    assert judged(tree)[b"/script"].outcome is outcome


def test_an_absolute_link_stays_in_the_tree(root: Path, tree: Tree) -> None:
    executable(root / "program", b"")
    (root / "link").symlink_to("/program")
    executable(root / "script", b"#!/link\n")
    found = judged(tree)[b"/script"]
    assert [asked.path for asked in found.asked] == [b"/script", b"/program"]
    assert (found.outcome, found.answer) == (Outcome.FAILS, "ENOEXEC")


ELF_FILES: dict[str, tuple[bytes, int, Outcome | None]] = {
    "program headers far beyond the end": (header(2, phoff=1 << 62), 0o755, Outcome.FAILS),
    "as many program headers as fit a number": (header(2, phnum=0xFFFF), 0o755, Outcome.FAILS),
    "no program headers": (header(3, phnum=0), 0o755, Outcome.FAILS),
    "a dynamic section of 2**63 bytes": (
        header(3) + struct.pack("<IIQQQQQQ", 2, 4, 64, 0, 0, 1 << 63, 1 << 63, 8), 0o644, Outcome.NOT_JUDGED,
    ),
    "strings beyond the end": (
        header(3, phnum=2)
        + struct.pack("<IIQQQQQQ", 2, 4, 176, 0, 0, 48, 48, 8)
        + struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, 1 << 40, 1 << 40, 8)
        + struct.pack("<qQqQqQ", 1, 1 << 39, 5, 0, 0, 0),
        0o644, Outcome.NOT_JUDGED,
    ),
    "an object with 65,535 sections that are not there": (header(1, shoff=1 << 20, shnum=0xFFFF), 0o644, None),
    "of another machine": (header(2, machine=183), 0o755, Outcome.NOT_JUDGED),
    "of 32 bits": (header(2, machine=3), 0o755, Outcome.NOT_JUDGED),
    "a library of 32 bits": (header(3, machine=3), 0o644, Outcome.NOT_JUDGED),
}  # fmt: skip


@pytest.mark.parametrize("case", ELF_FILES)
def test_elf_files_that_lie(root: Path, tree: Tree, case: str) -> None:
    content, mode, outcome = ELF_FILES[case]
    (root / "file").write_bytes(content)
    (root / "file").chmod(mode)
    found = judged(tree).get(b"/file")
    assert (found and found.outcome) is outcome


def test_a_module_with_many_sections_and_a_long_table_takes_no_time(root: Path, tree: Tree) -> None:
    sections, table = 0xFF00, 8 << 20
    section = struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 64, table, 0, 0, 0, 0)
    file = root / "x.ko"
    with file.open("wb") as out:
        out.write(header(1, shoff=64 + table, shnum=sections))
        out.write(b"a" * table)
        out.write(section * sections)
    timer = threading.Timer(10, os._exit, [1])
    timer.start()
    try:
        assert b"/x.ko" not in judged(tree)
    finally:
        timer.cancel()


@pytest.mark.needs("root")
def test_what_is_mounted_below_is_not_walked(root: Path) -> None:
    with open_tree("/") as tree:
        assert b"/proc" in tree.mounts


def test_a_module_is_one_whatever_its_mode(root: Path, tree: Tree) -> None:
    Compiler(root).module("x.ko").chmod(0o755)
    found = judged(tree, DENY)[b"/x.ko"]
    assert (found.kind, found.outcome, found.answer) == (Kind.MODULE, Outcome.DENIED, "EACCES")


def test_a_script_of_another_machines_program_is_not_judged(root: Path, tree: Tree) -> None:
    executable(root / "arm", header(2, machine=183))
    executable(root / "script", b"#!/arm\n")
    assert {found.outcome for found in judged(tree).values()} == {Outcome.NOT_JUDGED}
    assert {found.outcome for found in judged(tree, DENY).values()} == {Outcome.DENIED}


def test_a_module_that_is_compressed_depends_on_the_kernel(root: Path, tree: Tree) -> None:
    module = Compiler(root).module("plain.ko")
    (root / "x.ko.xz").write_bytes(lzma.compress(module.read_bytes()))
    (root / "text.ko").write_text("a tutor in Korean")
    (root / "text.ko.xz").write_bytes(lzma.compress(b"a text"))
    (root / "z.ko.zst").write_bytes(b"\x28\xb5\x2f\xfd whatever")
    seal = Seals("sha256", signed=True, measured=False)
    rules = f"{DENY}op=KMODULE fsverity_signature=TRUE action=ALLOW\n"
    found = judged(tree, rules, seal)
    assert {path: (one.kind, one.outcome) for path, one in found.items()} == {
        b"/plain.ko": (Kind.MODULE, Outcome.RUNS),
        b"/x.ko.xz": (Kind.MODULE, Outcome.NOT_JUDGED),
        b"/z.ko.zst": (Kind.MODULE, Outcome.NOT_JUDGED),
    }
    assert judged(tree, rules, seal, module_decompress=True)[b"/x.ko.xz"].outcome is Outcome.RUNS
    assert judged(tree, rules, seal, module_decompress=False)[b"/x.ko.xz"].outcome is Outcome.DENIED
    assert {one.outcome for one in judged(tree, DENY, seal).values()} == {Outcome.DENIED}


@pytest.mark.parametrize(("name", "mode", "judged_as"), [
    ("program", 0o111, Outcome.NOT_JUDGED), ("lib.so.1", 0o000, Outcome.NOT_JUDGED), ("shadow", 0o000, None),
])  # fmt: skip
def test_what_cannot_be_read(name: str, mode: int, judged_as: Outcome | None, tree: Tree) -> None:
    st = os.stat_result((0o100000 | mode, *[0] * 9))
    policy = parse_policy(f"policy_name=t policy_version=1.0.0\n{ALLOW}".encode())
    judge = Judge(RuleIndex(policy), Known(tree, Declared(())))
    found = judge.judge(Unreadable(b"/" + name.encode(), "Permission denied", st))
    assert (found and found.outcome) is judged_as


MUSL = "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"


@pytest.mark.parametrize(
    ("place", "configured", "outcome"),
    [
        ("usr/local/lib/libfoo.so", None, Outcome.RUNS),
        ("opt/libfoo.so", None, Outcome.LIBRARY_MISSING),
        ("opt/libfoo.so", "/usr/lib:/opt\n", Outcome.RUNS),
        ("usr/local/lib/libfoo.so", "/opt\n", Outcome.LIBRARY_MISSING),
    ],
)
def test_where_musl_looks(root: Path, tree: Tree, place: str, configured: str | None, outcome: Outcome) -> None:
    made = Compiler(root)
    for directory in ("lib", "etc"):
        (root / directory).mkdir()
    made.library("lib/ld-musl-x86_64.so.1", "int x;\n").chmod(0o755)
    made.library(place)
    made.program("program", MUSL, "-nostdlib", "-Wl,-e,main", needs=place)
    if configured is not None:
        (root / "etc/ld-musl-x86_64.path").write_text(configured)
    assert judged(tree)[b"/program"].outcome is outcome


def test_another_dynamic_linker_is_not_judged(root: Path, tree: Tree) -> None:
    made = Compiler(root)
    made.library("lib/linker.so", "int x;\n").chmod(0o755)
    made.library("lib/libfoo.so")
    made.program("program", "-Wl,--dynamic-linker=/lib/linker.so", "-nostdlib", "-Wl,-e,main", needs="lib/libfoo.so")
    found = judged(tree)[b"/program"]
    assert (found.outcome, "/lib/linker.so" in found.reason) == (Outcome.NOT_JUDGED, True)


def test_a_seal_is_measured_only_if_a_rule_asks(root: Path, tree: Tree) -> None:
    executable(root / "program", b"x" * 10_000)
    assert judged(tree, ALLOW, Seals("sha256", measured=False))[b"/program"].facts.fsverity_digest is None
    digest = judged(tree, ALLOW, Seals("sha256"))[b"/program"].facts.fsverity_digest
    assert digest is not None
    rules = f"{DENY}op=EXECUTE fsverity_digest={digest} action=ALLOW\n"
    assert judged(tree, rules, Seals("sha256"))[b"/program"].outcome is Outcome.NO_PROGRAM
    assert judged(tree, rules, Seals("sha512"))[b"/program"].outcome is Outcome.DENIED


def test_a_library_that_names_more_than_memory_holds(root: Path, tree: Tree) -> None:
    count = 4000
    dynamic = b"".join(struct.pack("<qQ", 1, 0) for _ in range(count)) + struct.pack("<qQqQ", 5, 0x10000, 0, 0)
    strings_at = 64 + 2 * 56 + len(dynamic)
    content = (
        header(3, phnum=2)
        + struct.pack("<IIQQQQQQ", 2, 4, 64 + 2 * 56, 0, 0, len(dynamic), len(dynamic), 8)
        + struct.pack("<IIQQQQQQ", 1, 4, strings_at, 0x10000, 0, 4000, 4000, 8)
        + dynamic
        + b"a" * 3999
        + b"\0"
    )
    (root / "lib.so").write_bytes(content)
    found = judged(tree)[b"/lib.so"]
    assert (found.outcome, found.reason) == (Outcome.NOT_JUDGED, "no sound ELF file: it needs 4000 libraries")
