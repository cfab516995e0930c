"""The parameters of dm-verity targets in device-mapper tables."""

import pytest

from ipe_emu.errors import UserError
from ipe_emu.integrity.dm_verity.table import VerityTable
from ipe_emu.integrity.facts import Digest

HASH = "d82898e743b7a2d1c25e2212d28d12874151b178f6a1927e4c51874f52fe6960"
PLAIN = f"1 7:1 7:0 4096 4096 2048 1 sha256 {HASH} 0102"
ROOT_HASH = Digest("sha256", bytes.fromhex(HASH))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("", None),
        (" 1 ignore_corruption", None),
        (" 2 root_hash_sig_key_desc cryptsetup:x", "cryptsetup:x"),
        (" 4 restart_on_corruption check_at_most_once root_hash_sig_key_desc a:b", "a:b"),
        (
            " 10 panic_on_corruption use_fec_from_device 7:2 fec_blocks 100 fec_start 5 fec_roots 2 ignore_zero_blocks",
            None,
        ),
    ],
)
def test_tables(options: str, key: str | None) -> None:
    assert VerityTable.parse(PLAIN + options) == VerityTable(ROOT_HASH, key)


def test_other_hashes() -> None:
    table = VerityTable.parse(f"0 254:1 254:1 1024 1024 9 10 blake2b-512 {'ab' * 64} -")
    assert table == VerityTable(Digest("blake2b-512", b"\xab" * 64))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "0 fields"),
        (PLAIN.rpartition(" ")[0], "9 fields"),
        (PLAIN.replace(HASH, HASH[1:]), "the digest is"),
        (PLAIN.replace(HASH, "x" * 64), "the digest is"),
        (PLAIN + " 1", "0 optional words follow where it says '1'"),
        (PLAIN + " 1 a b", "2 optional words follow where it says '1'"),
        (PLAIN + " x a", "1 optional words follow where it says 'x'"),
        (PLAIN + " ² a b", "2 optional words follow where it says"),
        (PLAIN + f" {'9' * 30} a", "1 optional words follow where it says"),
        (PLAIN + " 1 root_hash_sig_key_desc", "root_hash_sig_key_desc has no argument"),
    ],
)
def test_what_is_no_table(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        VerityTable.parse(text)
