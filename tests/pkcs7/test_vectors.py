"""Every recorded blob gets the answer of the kernel it was recorded on."""

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.keyring import Keyrings
from ipe_emu.pkcs7 import verify_pkcs7_signature
from ipe_emu.policy.parse import parse_policy
from tests.pkcs7.material import PLAIN, UNAVAILABLE, WITH_PLATFORM, Recorded, answer, recorded
from tests.vectors import KERNELS, load

SAME_NAME_LOADED = "426_post_dup_name"
"""Recorded after blob 000 was loaded: EEXIST is the answer of ``ipe_new_policyfs_node``, which has the names."""


def final(one: Recorded, keyrings: Keyrings, kernel: str) -> str:
    """What writing the blob to new_policy gives, as far as signature and text decide it."""
    got = answer(one.blob, keyrings, UNAVAILABLE[kernel])
    if isinstance(got, str):
        return got
    try:
        parse_policy(got)
    except KernelError as error:
        return error.name
    return "ok"


@pytest.mark.parametrize("kernel", KERNELS)
def test_secondary_keyring_only(kernel: str) -> None:
    different = {one.fault: (one.result, final(one, PLAIN, kernel)) for one in recorded(kernel)}
    assert not {fault: pair for fault, pair in different.items() if pair[0] != pair[1]}


def test_with_platform_keyring_blacklist_and_revocation_list() -> None:
    lines = [one for one in recorded("linux-6.12") if one.result_with_platform is not None]
    assert len(lines) > 290
    different = {one.fault: (one.result_with_platform, final(one, WITH_PLATFORM, "linux-6.12")) for one in lines}
    assert different.pop(SAME_NAME_LOADED) == ("EEXIST", "ok")
    assert not {fault: pair for fault, pair in different.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_only_blob_without_bytes_is_refused_before_it_gets_here(kernel: str) -> None:
    without = [line for line in load(kernel, "pkcs7-blobs") if line["blob"] is None]
    assert [(line["fault"], line["size"], line["result"]) for line in without] == [
        ("423_size_4m", 4 << 20, {"error": "ENOMEM"})
    ]


def test_what_the_platform_keyring_changes_is_told() -> None:
    blob = next(one.blob for one in recorded("linux-6.12") if one.fault == "245_rsa_wrong_msg_nocert")
    assert answer(blob, PLAIN) == "EKEYREJECTED"
    with pytest.raises(KernelError, match=r"ENOKEY: .*before that, EKEYREJECTED") as refused:
        verify_pkcs7_signature(blob, WITH_PLATFORM)
    assert refused.value.name == "ENOKEY"
