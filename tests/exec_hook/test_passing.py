"""Executions that go by: what was read of a program is believed only while the program cannot have changed."""

import os
import tempfile
from pathlib import Path

import pytest

from ipe_emu.binfmt.elf import Program
from ipe_emu.exec_hook import passing
from ipe_emu.exec_hook.passing import UnchangedPrograms
from ipe_emu.exec_hook.write_access import is_denied_by
from ipe_emu.integrity.facts import Facts
from tests.exec_hook.tracee_harness import Rehearsal, model

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

BOOT_ONLY = "DEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
PROGRAM = Program(1, complete=True)


@pytest.fixture
def nothing_is_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "_SETTLED_NS", -(10**18))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "program"
    path.write_bytes(b"content")
    with path.open() as file:  # whatever it lies on here, as if it told changes
        monkeypatch.setattr(passing, "_LOCAL", {passing._file_system(file.fileno())})
    return path


def added(programs: UnchangedPrograms, path: Path) -> Program | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        programs.add(fd, PROGRAM)
        return programs.find(os.fstat(fd))
    finally:
        os.close(fd)


@pytest.mark.usefixtures("nothing_is_too_new")
def test_a_program_is_known_until_it_changes(program: Path) -> None:
    programs = UnchangedPrograms()
    assert added(programs, program) is PROGRAM
    program.write_bytes(b"another")
    assert programs.find(program.stat()) is None


def test_a_program_that_changed_just_now_is_not_taken_in(program: Path) -> None:
    assert added(UnchangedPrograms(), program) is None


@pytest.mark.usefixtures("nothing_is_too_new")
def test_a_program_that_somebody_may_be_changing_is_not_taken_in(program: Path) -> None:
    with program.open("r+b"):
        assert added(UnchangedPrograms(), program) is None


@pytest.mark.usefixtures("nothing_is_too_new")
def test_a_file_system_that_may_change_unseen_is_not_believed() -> None:
    assert added(UnchangedPrograms(), Path("/proc/version")) is None
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as on_tmpfs:
        on_tmpfs.write(b"content")
        assert added(UnchangedPrograms(), Path(on_tmpfs.name)) is None


THROUGH_A_MAPPING = """
            fd = os.open("/run/program", os.O_RDWR)
            with mmap.mmap(fd, 0) as mapped:
                mapped[0]  # on tmpfs the page is writable from here on, and no time tells it
                mapped[0:13] = b"#!/run/other\\n"
            os.close(fd)
"""


@pytest.mark.usefixtures("nothing_is_too_new")
@pytest.mark.parametrize(
    "change", ['            put("/run/program", b"#!/run/other\\n")\n', THROUGH_A_MAPPING], ids=["written", "mapped"]
)
def test_a_program_that_became_a_script_is_judged_as_one(tree: Path, tmp_path: Path, change: str) -> None:
    with Rehearsal(tmp_path / "root", tree) as inside:
        inside.facts.paths[b"/program"] = Facts(boot_verified=True)
        ipe = model(BOOT_ONLY, inside.records.append)
        ipe.success_audit = False  # else nothing goes by
        inside.judge(ipe)
        copied = """
            for name in ("program", "other"):
                shutil.copy("/t/bin/hello_static", "/run/" + name)
            before = [execute("/run/program") for _ in range(3)]
"""
        source = copied + change + '            result = before, execute("/run/program")\n'
        assert inside.run(source) == [[{"exit": 0}] * 3, {"error": "EACCES"}]
        assert inside.asked() == ["BPRM_CHECK /run/other"]


@pytest.mark.parametrize(
    ("release", "denied"), [("6.10.14", True), ("6.11.0-9-generic", False), ("6.12.117", False), ("6.13", True)]
)
def test_releases_that_execute_what_is_open_for_writing(release: str, denied: bool) -> None:
    assert is_denied_by(release) is denied
