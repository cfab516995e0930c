"""A policy's rules, arranged so that a decision takes as long with 38,000 of them as with one.

A rule is a conjunction: it asks for a combination of the three booleans of a file (boot_verified, dm-verity signed,
fs-verity signed; eight classes of files), and perhaps for one root hash and one fs-verity digest. The rules of an
operation go into buckets by the digests they ask for. A file can meet the rules of four buckets at most: those that ask
for no digest, for its root hash, for its fs-verity digest, and for both. Within a bucket at most eight rules
can ever be the first to match: each must be the earliest of its bucket for some class. The lowest position of at most
four candidates is the first match in the order of the text.
"""

from collections.abc import Sequence

from attrs import frozen

from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.policy.rule import Action, Operation, Policy, Property, PropertyType, Rule

# A digest as a dictionary key; tuples of builtins hash and compare without a call into Python code.
DigestKey = tuple[str, bytes]

ALL_CLASSES = 0xFF
# For each boolean property, the classes of files that have it: bit number c is set for a class c with it.
CLASSES_WITH = {
    PropertyType.BOOT_VERIFIED_TRUE: 0b10101010,
    PropertyType.BOOT_VERIFIED_FALSE: 0b01010101,
    PropertyType.DMV_SIG_TRUE: 0b11001100,
    PropertyType.DMV_SIG_FALSE: 0b00110011,
    PropertyType.FSV_SIG_TRUE: 0b11110000,
    PropertyType.FSV_SIG_FALSE: 0b00001111,
}


def digest_key(digest: Digest | None) -> DigestKey | None:
    """Return what names a digest's bucket: equal for equal name, length and bytes (``ipe_digest_eval``)."""
    return None if digest is None else (digest.algorithm, digest.value)


def class_of(facts: Facts) -> int:
    """Return the class of a file, 0 to 7: a bit for each of its booleans.

    A signature that is not known of is FALSE, also where there is no verity at all (``evaluate_dmv_sig_false``).
    """
    return facts.boot_verified | facts.dmverity_signature << 1 | facts.fsverity_signature << 2


@frozen
class Demand:
    """What a rule asks for: classes of files (a mask of eight bits) and digests; None where any will do."""

    classes: int
    roothash: DigestKey | None
    fsverity_digest: DigestKey | None


def demand_of(properties: Sequence[Property]) -> Demand | None:
    """Return what the properties ask for together, or None if no file can have them all."""
    classes = ALL_CLASSES
    roothash: DigestKey | None = None
    fsverity_digest: DigestKey | None = None
    for prop in properties:
        key = digest_key(prop.digest)
        if prop.type is PropertyType.DMV_ROOTHASH:
            if key is None or roothash not in {None, key}:
                return None
            roothash = key
        elif prop.type is PropertyType.FSV_DIGEST:
            if key is None or fsverity_digest not in {None, key}:
                return None
            fsverity_digest = key
        else:
            classes &= CLASSES_WITH[prop.type]
    return Demand(classes, roothash, fsverity_digest) if classes else None


@frozen
class Candidate:
    """A rule that is the first of its bucket for ``classes``; ``order`` counts the rules of the policy."""

    order: int
    classes: int
    rule: Rule


Bucket = list[Candidate]


@frozen(eq=False)
class OperationTable:
    """The rules of one operation, by root hash and then by fs-verity digest, and what holds if none matches."""

    default: Action
    default_is_global: bool
    buckets: dict[DigestKey | None, dict[DigestKey | None, Bucket]]

    def candidates(self, roothash: DigestKey | None, fsverity_digest: DigestKey | None) -> list[Candidate]:
        """Return the rules that a file with these digests can meet: 32 at most, each bucket's in order."""
        found: list[Candidate] = []
        for root in (None,) if roothash is None else (None, roothash):
            by_fsverity = self.buckets.get(root)
            if by_fsverity:
                for fsverity in (None,) if fsverity_digest is None else (None, fsverity_digest):
                    found += by_fsverity.get(fsverity, ())
        return found

    def add(self, order: int, rule: Rule, demand: Demand) -> None:
        """Put a rule into its bucket, unless the bucket's earlier ones take every class it asks for."""
        bucket = self.buckets.setdefault(demand.roothash, {}).setdefault(demand.fsverity_digest, [])
        classes = demand.classes
        for earlier in bucket:
            classes &= ~earlier.classes
        if classes:
            bucket.append(Candidate(order, classes, rule))


class RuleIndex:
    """A policy, ready for ``evaluate``. Building it is linear in the number of rules; it never changes afterwards.

    ``policy`` must be complete, as parsed ones are; otherwise ValueError (``Policy.effective_default``).
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tables = {
            operation: OperationTable(policy.effective_default(operation), operation not in policy.defaults, {})
            for operation in Operation
        }
        for order, rule in enumerate(policy.rules):
            demand = demand_of(rule.properties)
            if demand is not None:
                self.tables[rule.operation].add(order, rule, demand)
