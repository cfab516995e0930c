import json
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ipe_emu.errors import UserError
from ipe_emu.rehearse.block import gpt, mbr
from ipe_emu.rehearse.block.partition import Partition
from ipe_emu.rehearse.block.partitions import read_partitions
from tests.rehearse.block.images import SFDISK, Bytes, disk

GPT = """label: gpt
size=1MiB, type=L, name="root"
size=2MiB, name="vérité", uuid=0F5B3A11-2C3D-4E5F-8899-AABBCCDDEEFF
size=1MiB, name="a b/c"
"""
DOS = """label: dos
label-id: 0xdeadbeef
size=1MiB, type=83
size=5MiB, type=5
size=1MiB, type=83
size=1MiB, type=82
size=512KiB, type=83
"""


@pytest.fixture(scope="module")
def gpt_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk(tmp_path_factory.mktemp("gpt") / "disk", GPT)


@pytest.fixture(scope="module")
def dos_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk(tmp_path_factory.mktemp("dos") / "disk", DOS)


def as_sfdisk_says(path: Path) -> list[tuple[int, int, int, str, str]]:
    listed = json.loads(subprocess.run([SFDISK, "--json", path], capture_output=True, check=True, timeout=30).stdout)
    found = []
    for entry in listed["partitiontable"]["partitions"]:
        number = int(entry["node"].removeprefix(str(path)))
        found.append((number, entry["start"], entry["size"], entry.get("uuid", "").lower(), entry.get("name", "")))
    return found


def shown(partitions: tuple[Partition, ...]) -> list[tuple[int, int, int, str, str]]:
    return [(p.number, p.start, p.sectors, p.uuid, p.label) for p in partitions]


def test_a_gpt_is_read_as_sfdisk_reads_it(gpt_disk: Path) -> None:
    found = read_partitions(Bytes(gpt_disk.read_bytes()))
    assert shown(found) == as_sfdisk_says(gpt_disk)
    assert [p.label for p in found] == ["root", "vérité", "a b/c"]
    assert found[1].uuid == "0f5b3a11-2c3d-4e5f-8899-aabbccddeeff"
    assert {p.type for p in found} == {"0fc63daf-8483-4772-8e79-3d69d8477de4"}  # Linux filesystem data


def test_a_dos_table_is_read_as_sfdisk_reads_it(dos_disk: Path) -> None:
    found = read_partitions(Bytes(dos_disk.read_bytes()))
    listed = as_sfdisk_says(dos_disk)
    assert [p.number for p in found] == [1, 2, 3, 5, 6] or len(found) == len(listed)
    for ours, theirs in zip(sorted(shown(found)), sorted(listed), strict=True):
        number, start, sectors, _, _ = theirs
        # Of the extended partition the kernel shows two sectors.
        assert ours[:3] == ((number, start, 2) if number == 2 else (number, start, sectors))
    assert found[0].uuid == "deadbeef-01"
    assert [p.uuid for p in found if p.number == 5] == ["deadbeef-05"]


@pytest.mark.parametrize("size", [512, 1024, 8192])
def test_a_disk_without_a_table(size: int) -> None:
    assert read_partitions(Bytes(bytes(size))) == ()


def header(data: bytes, lba: int = 1) -> bytearray:
    return bytearray(data[lba * 512 : lba * 512 + 92])


def with_header(data: bytes, changed: bytearray, lba: int = 1) -> Bytes:
    """Put a header back, with its checksum right again."""
    changed[16:20] = bytes(4)
    changed[16:20] = struct.pack("<I", zlib.crc32(changed))
    content = Bytes(data)
    content.data[lba * 512 : lba * 512 + 92] = changed
    return content


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        pytest.param(0, "<8s", b"EFI_PART", id="signature"),
        pytest.param(12, "<I", 513, id="header larger than a block"),
        pytest.param(12, "<I", 91, id="header smaller than a header"),
        pytest.param(12, "<I", 0xFFFFFFFF, id="header size without end"),
        pytest.param(24, "<Q", 2, id="own block"),
        pytest.param(40, "<Q", 1 << 40, id="first usable block behind the end"),
        pytest.param(48, "<Q", 1 << 63, id="last usable block behind the end"),
        pytest.param(48, "<Q", 1, id="last usable block before the first"),
        pytest.param(72, "<Q", 1 << 50, id="entries behind the end"),
        pytest.param(72, "<Q", (1 << 64) - 1, id="entries at the last block there can be"),
        pytest.param(72, "<Q", 16380, id="entries that do not fit"),
        pytest.param(80, "<I", 0, id="no entries"),
        pytest.param(80, "<I", 0xFFFFFFFF, id="entries without number"),
        pytest.param(80, "<I", 32769, id="entries of more than 4 MiB"),
        pytest.param(84, "<I", 256, id="entry size"),
        pytest.param(84, "<I", 0, id="entry size zero"),
        pytest.param(88, "<I", 1, id="entries' checksum"),
    ],
)
def test_headers_that_lie(gpt_disk: Path, offset: int, form: str, value: object) -> None:
    data = gpt_disk.read_bytes()
    changed = header(data)
    struct.pack_into(form, changed, offset, value)
    content = with_header(data, changed)
    assert gpt.read(content) is None
    # The alternate table is read only if the command line says gpt.
    forced = gpt.read(content, force=True)
    assert forced is not None
    assert shown(forced) == as_sfdisk_says(gpt_disk)


def test_a_wrong_checksum_of_the_header(gpt_disk: Path) -> None:
    content = Bytes(gpt_disk.read_bytes())
    content.data[512 + 56] ^= 1
    assert gpt.read(content) is None


def test_without_a_protective_mbr_a_gpt_is_none(gpt_disk: Path) -> None:
    content = Bytes(gpt_disk.read_bytes())
    content.data[446 + 4] = 0x83
    assert gpt.read(content) is None
    assert gpt.read(content, force=True) is not None
    assert mbr.read(content) is not None  # then it is what the MBR says


def test_a_protective_mbr_without_a_gpt_has_no_partitions(gpt_disk: Path) -> None:
    content = Bytes(gpt_disk.read_bytes())
    content.data[512:1024] = bytes(512)
    assert read_partitions(content) == ()


def with_entry(data: bytes, index: int, change: Callable[[bytearray], None]) -> Bytes:
    """Change an entry, with both checksums right again."""
    entries = bytearray(data[1024 : 1024 + 128 * 128])
    entry = entries[index * 128 : index * 128 + 128]
    change(entry)
    entries[index * 128 : index * 128 + 128] = entry
    changed = header(data)
    struct.pack_into("<I", changed, 88, zlib.crc32(entries))
    content = with_header(data, changed)
    content.data[1024 : 1024 + len(entries)] = entries
    return content


@pytest.mark.parametrize(
    ("first", "last", "there"),
    [
        pytest.param(1 << 40, (1 << 40) + 5, False, id="behind the end"),
        pytest.param(4096, 1 << 63, False, id="ends behind the end"),
        pytest.param(4096, 4095, False, id="empty"),
        pytest.param(0, 0, True, id="the first block"),
        pytest.param(16383, 16383, True, id="the last block"),
    ],
)
def test_entries_that_lie(gpt_disk: Path, first: int, last: int, there: bool) -> None:
    def change(entry: bytearray) -> None:
        struct.pack_into("<QQ", entry, 32, first, last)

    found = gpt.read(with_entry(gpt_disk.read_bytes(), 1, change))
    assert found is not None
    assert [p.number for p in found] == ([1, 2, 3] if there else [1, 3])


def test_an_entry_that_ends_before_it_begins(gpt_disk: Path) -> None:
    def change(entry: bytearray) -> None:
        struct.pack_into("<QQ", entry, 32, 4096, 100)

    with pytest.raises(UserError, match="partition 2 of the GPT ends at block 100"):
        gpt.read(with_entry(gpt_disk.read_bytes(), 1, change))


def test_mutated_tables(gpt_disk: Path, dos_disk: Path) -> None:
    """Whatever the bytes are: partitions within the disk, or a complaint."""
    seeds = random.Random(5)
    for path, spans in ((gpt_disk, [(446, 512), (512, 604), (1024, 1536)]), (dos_disk, [(440, 512)])):
        content = Bytes(path.read_bytes())
        start = bytes(content.data[:1536])
        found_some = 0
        for _ in range(1500):
            content.data[:1536] = start
            for _ in range(seeds.randint(1, 4)):
                content.data[seeds.randrange(*seeds.choice(spans))] = seeds.randrange(256)
            if path == gpt_disk and seeds.random() < 0.8:  # checksums right, so that what they protect is looked at
                struct.pack_into("<I", content.data, 512 + 88, zlib.crc32(content.data[1024 : 1024 + 128 * 128]))
                struct.pack_into("<I", content.data, 512 + 16, 0)
                struct.pack_into("<I", content.data, 512 + 16, zlib.crc32(content.data[512:604]))
            try:
                partitions = read_partitions(content)
            except UserError:
                continue
            found_some += bool(partitions)
            for p in partitions:
                assert 0 <= p.start < p.start + p.sectors <= content.size // 512
        assert found_some > 100


def logical_chain(links: int) -> Bytes:
    """A disk whose extended partition is a chain of empty tables, the last of which leads to the first."""
    content = Bytes(bytes(1 << 20))

    def record(start: int) -> bytes:
        return struct.pack("<B3sB3sII", 0, b"", 5, b"", start, 1000)

    content.data[446:462] = record(100)
    content.data[510:512] = b"\x55\xaa"
    for link in range(links):
        at = (100 + link) * 512
        content.data[at + 446 : at + 462] = record((link + 1) % links)
        content.data[at + 510 : at + 512] = b"\x55\xaa"
    return content


def test_a_chain_of_logical_partitions_without_end() -> None:
    found = mbr.read(logical_chain(7))
    assert found is not None
    assert [p.number for p in found] == [1]


@pytest.mark.parametrize(("type_", "system"), [(0xA5, "FreeBSD"), (0x63, "UnixWare"), (0xBF, "Solaris")])
def test_tables_of_other_systems_are_refused(dos_disk: Path, type_: int, system: str) -> None:
    content = Bytes(dos_disk.read_bytes())
    content.data[446 + 4] = type_
    with pytest.raises(UserError, match=system):
        read_partitions(content)


def test_a_boot_sector_is_no_table(dos_disk: Path) -> None:
    content = Bytes(dos_disk.read_bytes())
    content.data[446 + 16] = 0x41
    assert mbr.read(content) is None


def test_a_partition_of_a_shorter_disk_is_cut(dos_disk: Path) -> None:
    first = read_partitions(Bytes(dos_disk.read_bytes()))[0]
    content = Bytes(dos_disk.read_bytes()[: (first.start + 10) * 512])
    assert [(p.number, p.sectors) for p in read_partitions(content)] == [(1, 10)]
