"""Mutated blobs: only the documented errnos come out, and nothing passes that nobody signed."""

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from tests.pkcs7.der import indefinite, tlv
from tests.pkcs7.material import PLAIN, WITH_PLATFORM, answer, recorded

DOCUMENTED = {"EBADMSG", "EINVAL", "ENOPKG", "EKEYREJECTED", "ENOKEY", "ENODATA"}
MUTANTS = 8000
"""Per seed; each is asked of both sets of keyrings."""

TELLING = bytes.fromhex("00 01 02 03 04 05 06 10 13 17 18 1f 24 30 31 7f 80 81 82 83 84 a0 a1 a2 a3 a4 ff")
"""Tags and lengths that mean something."""


@cache
def blobs() -> tuple[bytes, ...]:
    return tuple(one.blob for one in recorded("linux-6.12") if 0 < len(one.blob) < 8000)


@cache
def signed_contents() -> frozenset[bytes]:
    """What somebody has signed in one of the recorded blobs: their texts, and what they parse to."""
    found = set()
    for blob in blobs():
        found |= {blob[start:end] for _, start, end in elements(blob) if blob.startswith(b"policy_name=", start)}
        content = answer(blob, PLAIN)
        if isinstance(content, bytes):
            found.add(content)
    return frozenset(found)


def elements(blob: bytes) -> list[tuple[int, int, int]]:
    """Start, start of content and end of every element of definite length."""

    def walk(pos: int, end: int) -> Iterator[tuple[int, int, int]]:
        while end - pos >= 2:
            size, start = blob[pos + 1], pos + 2
            if size > 0x82 or size == 0x80:
                return
            if size > 0x80:
                start += size - 0x80
                size = int.from_bytes(blob[pos + 2 : start])
            if start + size > end:
                return
            yield pos, start, start + size
            if blob[pos] & 0x20:
                yield from walk(start, start + size)
            pos = start + size

    return list(walk(0, len(blob)))


def change_bytes(blob: bytes, rng: random.Random) -> bytes:
    out = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        out[rng.randrange(len(out))] = rng.choice(TELLING) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(out)


def cut_or_insert(blob: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(blob)), rng.choice((1, 2, 4, 30))
    if rng.random() < 0.5:
        return blob[:at] + blob[at + size :]
    return blob[:at] + bytes(rng.choices(TELLING, k=size)) + blob[at:]


def change_structure(blob: bytes, rng: random.Random) -> bytes:
    """Replace one element and put the lengths around it right again."""
    all_elements = elements(blob)
    if not all_elements:
        return change_bytes(blob, rng)
    pos, start, end = rng.choice(all_elements)
    tag, content = blob[pos], blob[start:end]
    other = rng.choice(all_elements)
    new = rng.choice(
        (
            b"",
            blob[pos:end] * 2,
            tlv(rng.choice(TELLING), content),
            indefinite(tag, content),
            tlv(tag),
            blob[other[0] : other[2]],
            tlv(tag, bytes([rng.choice(TELLING)]), content[1:]),
        )
    )
    for outer_pos, outer_start, outer_end in sorted(all_elements, reverse=True):
        if outer_start <= pos and end <= outer_end and outer_pos < pos:
            around = blob[outer_start:pos], new, blob[end:outer_end]
            write = indefinite if rng.random() < 0.05 else tlv
            new, pos, end = write(blob[outer_pos], *around), outer_pos, outer_end
    return blob[:pos] + new + blob[end:]


def mutate(blob: bytes, rng: random.Random) -> bytes:
    how = rng.choices((change_bytes, cut_or_insert, change_structure), (4, 2, 4))[0]
    return how(blob, rng)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutants(seed: int) -> None:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(MUTANTS):
        mutant = mutate(rng.choice(blobs()), rng)
        for keyrings in (PLAIN, WITH_PLATFORM):
            got = answer(mutant, keyrings)
            if isinstance(got, bytes):
                assert not got or got in signed_contents(), mutant.hex()
                got = "ok"
            else:
                assert got in DOCUMENTED, mutant.hex()
            seen[got] += 1
    assert set(seen) >= DOCUMENTED - {"ENODATA"} | {"ok"}, "the mutants are too tame"
    assert seen["ok"] > MUTANTS // 100


def test_every_truncation_of_a_good_blob_is_refused() -> None:
    good = next(one.blob for one in recorded("linux-6.12") if one.fault == "006_cms_attrs_nosmimecap")
    assert {answer(good[:size], PLAIN) for size in range(len(good))} <= {"EBADMSG", "EINVAL"}


@pytest.mark.parametrize("fault", ["001_smime_noattr_nocerts", "011_cms_keyid_ec"])
def test_every_changed_bit_of_the_content_is_refused(fault: str) -> None:
    good = next(one.blob for one in recorded("linux-6.12") if one.fault == fault)
    content = answer(good, PLAIN)
    assert isinstance(content, bytes)
    at = good.index(content)
    for bit in range(len(content) * 8):
        bad = bytearray(good)
        bad[at + bit // 8] ^= 1 << bit % 8
        assert answer(bytes(bad), PLAIN) == "EKEYREJECTED"


@pytest.mark.parametrize("octet", [b"\0", b"\x30", b"\x30\x80", b"\xa0\x80", b"\x24\x80", b"\x31\x82\xff\xff", b"\xff"])
def test_hostile_nesting_and_repetition_ends_soon(octet: bytes) -> None:
    blob = (octet * 65535)[:65535]
    assert answer(blob, PLAIN) == "EBADMSG"
    inside = indefinite(0x30, tlv(6, bytes.fromhex("2a864886f70d010702")), (octet * 65000)[:65000])
    assert answer(inside[:65535], PLAIN) in {"EBADMSG", "EINVAL"}
