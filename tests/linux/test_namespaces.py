import os
from pathlib import Path

import pytest

from ipe_emu.linux import namespaces
from ipe_emu.linux.namespaces import IdMap, IdRange


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("alice:100000:65536\n", ((100000, 65536),)),
        ("bob:1:2\n1000:200000:10\nalice:100000:65536\n", ((200000, 10), (100000, 65536))),
        ("bob:100000:65536\n", ()),
        ("", ()),
        ("alice:x:65536\nalice:1\nalice:1:0\nalice:1:2:3\n# comment\n", ()),
    ],
)
def test_subordinate_ids_are_those_of_the_user_by_name_or_number(
    tmp_path: Path, text: str, ranges: tuple[tuple[int, int], ...]
) -> None:
    file = tmp_path / "subuid"
    file.write_text(text)
    assert namespaces.subordinate_ids(file, ("alice", "1000")) == ranges


def test_without_the_file_there_are_none(tmp_path: Path) -> None:
    assert namespaces.subordinate_ids(tmp_path / "subuid", ("alice",)) == ()


@pytest.mark.needs("user-namespaces")
def test_a_map_is_written_and_read_back() -> None:
    written_out, written_in = os.pipe()
    uid, gid = os.getuid(), os.getgid()
    child = os.fork()
    if child == 0:
        try:
            namespaces.unshare(namespaces.Namespace.USER)
            namespaces.write_maps("self", IdMap((IdRange(7, uid, 1),), (IdRange(8, gid, 1),), setgroups=False))
            current = namespaces.current_map()
            assert current == IdMap((IdRange(7, 7, 1),), (IdRange(8, 8, 1),), setgroups=False)
            assert (os.getuid(), os.getgid(), namespaces.is_initial()) == (7, 8, False)
            os.write(written_in, b"good")
        finally:
            os._exit(0)
    os.close(written_in)
    with os.fdopen(written_out, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    assert said == b"good"
