"""The members of an image, and where the kernel stops reading them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.profiles import PROFILES
from ipe_emu.rehearse.image.archive import EndOfArchive, Fault
from ipe_emu.rehearse.image.compression import Limits
from ipe_emu.rehearse.image.open import open_image
from tests.rehearse.image.making import DIRECTORY, LINK, REFUSED, TOOLS, TRAILER, compress, member

A = member(b"a", data=b"first")
B = member(b"b", data=b"second")


def read(
    path: Path, *images: bytes, kernel: str = "linux-7.3", limits: Limits | None = None
) -> tuple[dict[bytes, bytes], Fault | None]:
    """What is in the images, a name's last content, and the fault."""
    paths = []
    for number, image in enumerate(images):
        paths.append(path / f"{number}.img")
        paths[-1].write_bytes(image)
    found = {}
    with open_image(paths, PROFILES[kernel], limits=limits) as opened:
        for entry in opened.members:
            if not isinstance(entry, EndOfArchive):
                found[entry.name] = b"".join(opened.members.data())
        return found, opened.members.fault


@pytest.mark.parametrize("kind", TOOLS)
def test_every_compression(tmp_path: Path, kind: str) -> None:
    data = b"much " * 200_000
    image = compress(TOOLS[kind], member(b"big", data=data) + B + TRAILER)
    assert read(tmp_path, image) == ({b"big": data, b"b": b"second"}, None)


@pytest.mark.parametrize("kind", TOOLS)
def test_a_compressed_archive_behind_microcode_and_padding_and_others(tmp_path: Path, kind: str) -> None:
    early = member(b"kernel/x86/microcode/GenuineIntel.bin", data=b"microcode") + TRAILER
    image = (
        early + bytes(-len(early) % 512) + compress(TOOLS[kind], A + TRAILER) + bytes(64) + compress(TOOLS["gzip"], B)
    )
    assert read(tmp_path, image) == (
        {b"kernel/x86/microcode/GenuineIntel.bin": b"microcode", b"a": b"first", b"b": b"second"},
        None,
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_tool_makes_and_the_kernel_refuses(tmp_path: Path, kind: str) -> None:
    command, message = REFUSED[kind]
    found, fault = read(tmp_path, A + compress(command, member(b"b", data=b"second" * 100_000) + TRAILER))
    assert found == {b"a": b"first"}
    assert fault is not None
    assert fault.message == message
    assert (fault.offset, fault.after) == (len(A), b"a")


@pytest.mark.parametrize("kind", TOOLS)
@pytest.mark.parametrize("part", [0.2, 0.7, 0.99])
def test_a_cut_compressed_archive_is_a_fault(tmp_path: Path, kind: str, part: float) -> None:
    content = b"".join(str(n).encode() for n in range(100_000))
    image = compress(TOOLS[kind], member(b"a", data=content) + TRAILER)
    if kind == "gzip" and part == 0.99:
        part = 0.98  # elsewhere it is the trailer that is cut, see below
    found, fault = read(tmp_path, image[: int(len(image) * part)])
    assert fault is not None
    assert not fault.exact
    assert content.startswith(found.get(b"a", b""))


def test_a_gzip_trailer_that_is_missing_cannot_be_judged(tmp_path: Path) -> None:
    image = compress(TOOLS["gzip"], A + TRAILER)
    with pytest.raises(NotJudgedError, match="lacks its trailer"):
        read(tmp_path, image[:-1])


def test_the_kernel_does_not_look_at_the_checksum_of_gzip(tmp_path: Path) -> None:
    image = compress(TOOLS["gzip"], A + TRAILER)
    assert read(tmp_path, image[:-8] + bytes(8)) == ({b"a": b"first"}, None)


def test_gzip_with_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(A + TRAILER)
    image = compress(["gzip", "-c", str(tmp_path / "initrd")], b"")
    assert b"initrd\0" in image
    assert read(tmp_path, image) == ({b"a": b"first"}, None)


def test_images_are_put_behind_each_other_at_multiples_of_four(tmp_path: Path) -> None:
    first = compress(TOOLS["gzip"], A + TRAILER + bytes(1))
    assert len(first) % 4
    assert read(tmp_path, first, B, A) == ({b"a": b"first", b"b": b"second"}, None)


def faults() -> Iterator[tuple[str, bytes, str, int, int | None]]:
    zipped = compress(TOOLS["gzip"], A)
    yield "no-magic", A + b"0" + b"x" * 200, "no cpio magic", len(A), None
    yield (
        "old-format",
        A + member(b"b", magic=b"070707"),
        "incorrect cpio method used: use -H newc option",
        len(A),
        None,
    )
    yield "padding", A + bytes(1) + B, "broken padding", len(A) + 1, None
    yield "junk", A + b"junk", "invalid magic at start of compressed archive", len(A), None
    yield "checksum", A + member(b"b", data=b"xy", magic=b"070702", checksum=1), "bad data checksum", len(A), None
    yield "no-nul", A + member(b"b" * 8, name_size=4), "malformed archive", len(A), None
    yield "digits", A + member(b"b", raw={2: b"0x000000"}), "damaged header", len(A), None
    yield "junk-within", A + compress(TOOLS["gzip"], B + b"junk"), "junk within compressed archive", len(A), len(B)
    yield "padding-within", A + compress(TOOLS["gzip"], B + bytes(2) + A), "broken padding", len(A), len(B) + 2
    yield "cut-within", A + compress(TOOLS["gzip"], B[:-4]), "junk at the end of compressed archive", len(A), 0
    yield "zeros-first", compress(TOOLS["gzip"], bytes(4) + B), "no cpio magic", 0, 0
    yield "empty", compress(TOOLS["gzip"], b""), "junk at the end of compressed archive", 0, 0
    yield (
        "two-members-of-gzip",
        zipped + compress(TOOLS["gzip"], b"x" + A),
        "junk within compressed archive",
        len(zipped),
        0,
    )


@pytest.mark.parametrize(
    ("image", "message", "offset", "within"), [f[1:] for f in faults()], ids=[f[0] for f in faults()]
)
def test_where_the_kernel_stops(tmp_path: Path, image: bytes, message: str, offset: int, within: int | None) -> None:
    _, fault = read(tmp_path, image + B)
    assert fault is not None
    assert (fault.message, fault.offset, fault.within, fault.exact) == (message, offset, within, True)
    assert message in str(fault)


def test_zeros_before_a_compressed_archive_and_within_a_later_one(tmp_path: Path) -> None:
    image = bytes(5) + compress(TOOLS["gzip"], A) + bytes(3) + compress(TOOLS["xz"], bytes(8) + B)
    assert read(tmp_path, image) == ({b"a": b"first", b"b": b"second"}, None)


def test_an_older_kernel_reads_what_it_can_of_a_number(tmp_path: Path) -> None:
    image = member(b"a", data=b"x" * 0x12, raw={6: b"0x12zzzz"})
    assert read(tmp_path, image, kernel="linux-6.12") == ({b"a": b"x" * 0x12}, None)


def test_an_image_that_ends_within_a_file_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes((A + B)[:-4])
    with open_image([tmp_path / "i"], PROFILES["linux-7.3"]) as opened:
        for _ in opened.members:
            list(opened.members.data())
        assert opened.members.fault is None
        assert opened.members.cut == b"b"


def test_members_without_a_usable_name_are_passed_over(tmp_path: Path) -> None:
    image = member(b"x", name_size=0) + member(b"y" * 4096, data=b"1") + member(b"d", DIRECTORY, data=b"data") + B
    assert read(tmp_path, image) == ({b"b": b"second"}, None)
    with pytest.raises(NotJudgedError, match="depends on the size of its buffers"):
        read(tmp_path, compress(TOOLS["xz"], image))


def test_a_target_may_be_as_long_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(member(b"l", LINK, b"t" * 4096) + member(b"m", LINK, b"t" * 4097) + TRAILER)
    with open_image([tmp_path / "i"], PROFILES["linux-7.3"]) as opened:
        targets = [entry.target for entry in opened.members if not isinstance(entry, EndOfArchive)]
    assert targets == [b"t" * 4096]


def test_a_bomb_is_stopped(tmp_path: Path) -> None:
    bomb = compress(TOOLS["xz"], member(b"a", data=bytes(20 << 20)) + TRAILER)
    assert len(bomb) < 8192
    with pytest.raises(NotJudgedError, match="more than 1048576 bytes"):
        read(tmp_path, bomb, limits=Limits(unpacked=1 << 20))
    with pytest.raises(NotJudgedError, match="more than 2 members"):
        read(tmp_path, A + B + A, limits=Limits(entries=2))


@pytest.mark.parametrize("command", [["xz", "--check=crc32", "-9", "-c"], ["zstd", "-q", "--ultra", "-22", "-c"]])
def test_a_window_is_limited(tmp_path: Path, command: list[str]) -> None:
    image = compress(command, member(b"a", data=bytes(9 << 20)) + TRAILER)
    with pytest.raises(NotJudgedError, match="window of more than 1048576 bytes"):
        read(tmp_path, image, limits=Limits(window=1 << 20))


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path / "empty", "empty"),
        (Path("/dev/null"), "regular"),
    ):
        with pytest.raises(UserError, match=reason), open_image([path], PROFILES["linux-7.3"]):
            pass
