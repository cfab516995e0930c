"""Keyrings as the recorded kernels had them, and the recorded blobs."""

import base64
import os
from functools import cache
from typing import NamedTuple

from ipe_emu.errors import KernelError
from ipe_emu.keyring import Keyrings, load_blacklist, load_certificates
from ipe_emu.pkcs7 import verify_pkcs7_signature
from tests.vectors import KEYS, load

NO_STREEBOG = frozenset({"streebog256", "streebog512"})
UNAVAILABLE = {"linux-6.12": NO_STREEBOG, "linux-7.3": NO_STREEBOG | {"sm3"}}

BUILTIN = load_certificates([KEYS / "builtin-trusted.pem"])
PLAIN = Keyrings(builtin=BUILTIN)
WITH_PLATFORM = Keyrings(
    builtin=BUILTIN,
    platform=load_certificates([KEYS / "plat.pem"]),
    blacklist=load_blacklist([KEYS / "blk.pem"]),
    revocation=load_certificates([KEYS / "rev.pem"]),
)

TEXT = b"policy_name=X policy_version=1.0.0\nDEFAULT action=ALLOW\n"


class Recorded(NamedTuple):
    fault: str
    blob: bytes
    result: str
    result_with_platform: str | None
    """``ok`` or the errno's name; None where it was not recorded."""


@cache
def recorded(kernel: str) -> tuple[Recorded, ...]:
    """The recorded blobs whose bytes are in the file."""
    lines = [line for line in load(kernel, "pkcs7-blobs") if line["blob"] is not None]
    assert len(lines) > 290, "recorded blobs are missing"
    return tuple(
        Recorded(
            line["fault"],
            base64.b64decode(line["blob"]),
            line["result"].get("error", "ok"),
            line["result_with_platform"].get("error", "ok") if "result_with_platform" in line else None,
        )
        for line in lines
    )


def blob_of(fault: str) -> bytes:
    (found,) = [line.blob for line in recorded("linux-6.12") if line.fault == fault]
    return found


def answer(blob: bytes, keyrings: Keyrings, unavailable: frozenset[str] = NO_STREEBOG) -> bytes | str:
    """The content, or the name of the errno."""
    try:
        return verify_pkcs7_signature(blob, keyrings, unavailable_hashes=unavailable)
    except KernelError as error:
        refused = error
    assert refused.reason != os.strerror(refused.errno or 0), "an errno without a reason of its own"
    assert refused.function, "an errno without the kernel function that gives it"
    return refused.name
