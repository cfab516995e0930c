"""Unified kernel images, made here section by section, and hostile ones."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.image.archive import EndOfArchive
from ipe_emu.rehearse.image.open import Kind, open_image
from tests.rehearse.image.making import TOOLS, compress, member

PROFILE = PROFILES["linux-7.3"]
INITRD = compress(TOOLS["gzip"], member(b"init", data=b"#!"))
UCODE = member(b"microcode")


def uki(sections: Sequence[tuple[str, bytes]], *, optional: int = 240) -> bytes:
    """A PE file: stub, headers, a section table, and the data of each section at a multiple of 512."""
    headers = 0x80 + 24 + optional + 40 * len(sections)
    offset = -(-headers // 512) * 512
    table, data = b"", b""
    for name, content in sections:
        raw = -(-len(content) // 512) * 512
        table += struct.pack(
            "<8sIIIIIIHHI", name.encode(), len(content), 0x1000, raw, offset + len(data), 0, 0, 0, 0, 0
        )
        data += content.ljust(raw, b"\0")
    start = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, optional, 0x206)
    return (start.ljust(0x80, b"\0") + coff + bytes(optional) + table).ljust(offset, b"\0") + data


def names_in(path: Path, profile: int | None = None) -> tuple[list[bytes], str | None, str | None]:
    with open_image([path], PROFILE, uki_profile=profile) as image:
        assert image.kind is Kind.UKI
        names = [entry.name for entry in image.members if not isinstance(entry, EndOfArchive)]
        assert image.members.fault is None
        return names, image.cmdline, image.uname


def test_initrd_behind_microcode_with_command_line_and_release(tmp_path: Path) -> None:
    (tmp_path / "uki").write_bytes(
        uki(
            [
                (".text", b"stub"),
                (".linux", b"kernel"),
                (".initrd", INITRD),
                (".ucode", UCODE),
                (".cmdline", b"quiet\nrd.break \0"),
                (".uname", b"6.12.117\n"),
            ]
        )
    )
    assert names_in(tmp_path / "uki") == ([b"microcode", b"init"], "quiet rd.break", "6.12.117")


def test_a_profile_overrides_the_base(tmp_path: Path) -> None:
    other = compress(TOOLS["xz"], member(b"other"))
    (tmp_path / "uki").write_bytes(
        uki(
            [
                (".initrd", INITRD), (".cmdline", b"base"), (".profile", b"ID=regular"),
                (".profile", b"ID=reset"), (".cmdline", b"reset"), (".initrd", other),
            ]
        )
    )  # fmt: skip
    assert names_in(tmp_path / "uki") == ([b"init"], "base", None)
    assert names_in(tmp_path / "uki", 1) == ([b"other"], "reset", None)
    with pytest.raises(UserError, match="no profile @2: this image has 2"):
        names_in(tmp_path / "uki", 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (uki([(".initrd", INITRD)])[:-512], "was cut"),
        (uki([(".linux", b"kernel")]), r"without a section \.initrd"),
        (uki([(".initrd", INITRD), (".initrd", INITRD)]), "twice in one profile"),
        (b"MZ", "ends within the offset of its PE header"),
        (b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0xFFFFFFF0), "ends within its PE header"),
        (b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + bytes(64), "no PE file"),
        (uki([(".cmdline", b"x" * (1 << 20) + b"x"), (".initrd", INITRD)]), "a text has 1048576 at most"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "uki").write_bytes(data)
    with pytest.raises(UserError, match=reason):
        names_in(tmp_path / "uki")


def test_only_a_uki_has_profiles_and_it_is_booted_alone(tmp_path: Path) -> None:
    (tmp_path / "uki").write_bytes(uki([(".initrd", INITRD)]))
    (tmp_path / "initrd").write_bytes(INITRD)
    with pytest.raises(UserError, match="no UKI"), open_image([tmp_path / "initrd"], PROFILE, uki_profile=0):
        pass
    with pytest.raises(UserError, match="booted alone"), open_image([tmp_path / "initrd", tmp_path / "uki"], PROFILE):
        pass


def test_mutated_files_give_an_image_or_an_error(tmp_path: Path) -> None:
    whole = uki([(".initrd", INITRD), (".ucode", UCODE), (".cmdline", b"quiet"), (".profile", b""), (".uname", b"6")])
    choice = random.Random(7)
    path = tmp_path / "uki"
    opened = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(choice.randrange(1, 4)):
            data[choice.randrange(2, 0x300)] = choice.randrange(256)
        path.write_bytes(bytes(data[: choice.choice([len(data), choice.randrange(2, len(data))])]))
        try:
            with open_image([path], PROFILE) as image:
                for _ in image.members:
                    list(image.members.data())
            opened += 1
        except (UserError, NotJudgedError):
            pass
    assert 0 < opened < 500
