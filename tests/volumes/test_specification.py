"""What ``--volume`` says."""

from pathlib import Path

import pytest

from ipe_emu.errors import UserError
from ipe_emu.volumes.specification import TreeOptions, VolumeSpecification, parse


def test_all_of_it() -> None:
    assert parse("/m=a.img,roothash=ab,hash=a.verity,hash-offset=512,signature=a.p7s") == VolumeSpecification(
        Path("/m"), Path("a.img"), "ab", Path("a.verity"), 512, Path("a.p7s")
    )


def test_a_tree_without_superblock() -> None:
    text = (
        "/m=a.img,roothash=ab,hash-offset=4096,no-superblock,algorithm=sha512,format=0,data-block-size=512,"
        "hash-block-size=1024,data-blocks=8,salt=00ff"
    )
    found = parse(text)
    assert found.tree == TreeOptions("sha512", 0, 512, 1024, 8, b"\0\xff")
    assert found.hash_image is None
    assert parse("/m=a,roothash=ab,hash=h,no-superblock").tree == TreeOptions()


def test_what_is_no_option_belongs_to_the_path_before_it() -> None:
    found = parse("/m=a,b.img,roothash=ab,hash=c,d=e.verity")
    assert (found.image, found.hash_image) == (Path("a,b.img"), Path("c,d=e.verity"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is DIR=IMAGE,roothash=HEX"),
        ("/m", "it is DIR=IMAGE,roothash=HEX"),
        ("=a,roothash=ab,hash=h", "it is DIR=IMAGE,roothash=HEX"),
        ("/m=a,hash=h", "roothash=HEX is missing"),
        ("/m=a,roothash=ab", "the hash tree is missing"),
        ("/m=a,roothash=ab,roothash=cd,hash=h", "roothash is given twice"),
        ("/m=a,roothash=ab,hash=h,hash-offset=-1", "hash-offset is '-1'"),
        ("/m=a,roothash=ab,hash=h,salt=00", "salt: the superblock says this"),
        ("/m=a,roothash=ab,hash=h,no-superblock,salt=0", "salt is '0'"),
        ("/m=a,roothash=ab,hash=h,no-superblock,data-blocks=99999999999999999999", "data-blocks is"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse(text)
    assert str(raised.value).startswith(f"--volume {text}: ")
