"""binfmt_misc registrations as values."""

from pathlib import Path

import pytest

from ipe_emu.binfmt import script
from ipe_emu.errors import NotJudgedError
from ipe_emu.exec_hook import binfmt_misc
from ipe_emu.exec_hook.binfmt_misc import Format


def head(text: bytes) -> bytes:
    return text[: script.BUFFER_SIZE].ljust(script.BUFFER_SIZE, b"\0")


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "status").write_text("enabled\n")
    (tmp_path / "register").write_text("")
    (tmp_path / "qemu").write_text(
        "enabled\ninterpreter /usr/bin/qemu\nflags: OCF\noffset 0\nmagic 7f454c4600b7\nmask ffffffff00ff\n"
    )
    (tmp_path / "java").write_text("enabled\ninterpreter /usr/bin/java wrapper\nflags: \nextension .jar\n")
    (tmp_path / "off").write_text("disabled\ninterpreter /usr/bin/off\nflags: \noffset 2\nmagic 4d5a\n")
    (tmp_path / "at").write_text("enabled\ninterpreter /usr/bin/at\nflags: P\noffset 8\nmagic 4149\n")
    return tmp_path


def test_registrations(registry: Path) -> None:
    formats = binfmt_misc.registered_for_all(str(registry))
    assert {f.name: f.flags for f in formats} == {"qemu": "OCF", "java": "", "at": "P"}
    cases = {
        (b"\x7fELF\x99\xb7", b"x"): b"/usr/bin/qemu",
        (b"\x7fELF\x00\xb8", b"x"): None,
        (b"anything", b"/a/b.jar"): b"/usr/bin/java wrapper",
        (b"anything", b"/a.jar/b"): None,
        (b"anything", b"jar"): None,
        (b"12345678AI", b"x"): b"/usr/bin/at",
        (b"12MZ", b"x"): None,
        (b"", b"x"): None,
    }
    for (text, name), interpreter in cases.items():
        found = binfmt_misc.match(formats, head(text), name)
        assert (found.interpreter if found else None) == interpreter, (text, name)


def test_disabled_or_absent(registry: Path, tmp_path: Path) -> None:
    (registry / "status").write_text("disabled\n")
    assert binfmt_misc.registered_for_all(str(registry)) == ()
    without = tmp_path / "filesystems"
    without.write_text("nodev\ttmpfs\n\text4\n")
    assert binfmt_misc.registered_for_all(str(tmp_path / "nothing"), str(without)) == ()


def test_what_may_be_registered_unseen_is_not_judged(tmp_path: Path) -> None:
    with_it = tmp_path / "filesystems"
    with_it.write_text("nodev\ttmpfs\nnodev\tbinfmt_misc\n\text4\n")
    with pytest.raises(NotJudgedError, match="not mounted"):
        binfmt_misc.registered_for_all(str(tmp_path / "nothing"), str(with_it))


def test_two_that_match_are_not_judged() -> None:
    formats = (Format("a", b"/a", "", b"X", b"\xff"), Format("b", b"/b", "", b"XY", b"\xff\xff"))
    assert binfmt_misc.match(formats, head(b"XZ"), b"x") == formats[0]
    with pytest.raises(NotJudgedError, match="a, b"):
        binfmt_misc.match(formats, head(b"XY"), b"x")
