"""Several sources of facts as one."""

import os
from pathlib import Path

import pytest
from attrs import frozen

from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.sources import Combined, OpenFile, Place

ROOT_HASH, OTHER_HASH = Digest("sha256", bytes(32)), Digest("sha256", bytes(range(32)))
BOOT = Facts(boot_verified=True)
VOLUME = Facts(dmverity_roothash=ROOT_HASH, dmverity_signature=True)
DOUBT = Facts(dmverity_in_doubt="dm", fsverity_in_doubt="fs")
SEALED = Facts(fsverity_digest=ROOT_HASH, fsverity_signature=True)


@frozen
class Knows:
    facts: Facts

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        return self.facts


@pytest.mark.parametrize(
    ("known", "together"),
    [
        ([], NO_FACTS),
        ([NO_FACTS, VOLUME], VOLUME),
        ([BOOT, NO_FACTS], BOOT),
        ([BOOT, VOLUME, SEALED], Facts(True, ROOT_HASH, True, ROOT_HASH, True)),
        ([VOLUME, Facts(dmverity_roothash=OTHER_HASH)], VOLUME),
        ([Facts(dmverity_roothash=OTHER_HASH), VOLUME], Facts(dmverity_roothash=OTHER_HASH)),
        ([SEALED, Facts(fsverity_digest=OTHER_HASH)], SEALED),
        ([Facts(fsverity_digest=OTHER_HASH), SEALED], Facts(fsverity_digest=OTHER_HASH)),
        ([BOOT, DOUBT, BOOT], Facts(True, dmverity_in_doubt="dm", fsverity_in_doubt="fs")),
        ([VOLUME, DOUBT], Facts(False, ROOT_HASH, True, fsverity_in_doubt="fs")),
        ([DOUBT, SEALED], Facts(False, None, False, ROOT_HASH, True, dmverity_in_doubt="dm")),
    ],
)
def test_the_first_that_knows_a_digest_says_whether_it_is_signed(known: list[Facts], together: Facts) -> None:
    combined = Combined([Knows(facts) for facts in known])
    assert combined.facts_of(None, Path("/").stat(), lambda: -1) == together
