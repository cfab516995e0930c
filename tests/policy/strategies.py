"""Policies, rules and facts for Hypothesis: the one home of these strategies."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.policy.rule import Action, Operation, Policy, Property, PropertyType, Rule, Version

DIGEST_TYPES = (PropertyType.DMV_ROOTHASH, PropertyType.FSV_DIGEST)
BOOLEAN_TYPES = tuple(kind for kind in PropertyType if kind not in DIGEST_TYPES)
DELIMITERS = " \t\n\r#\0"

# What a name or an algorithm can be: any bytes but those that end a token, a line, a comment-free part or the text.
words = st.text(st.characters(codec="latin-1", exclude_characters=DELIMITERS), min_size=1, max_size=20)
algorithms = st.sampled_from(["sha256", "sha512", "SHA256", ""]) | words.filter(lambda word: ":" not in word)
digests = st.builds(Digest, algorithms, st.binary(max_size=64))
# Few digests, so that rules and facts meet: they differ in the name, in the length, or in the bytes.
few_digests = st.sampled_from(
    [Digest("sha256", b"\1"), Digest("sha256", b"\2"), Digest("sha512", b"\1"), Digest("sha256", b"\1\0")]
)

u16 = st.integers(0, 0xFFFF)
versions = st.builds(Version, u16, u16, u16)
operations = st.sampled_from(Operation)
actions = st.sampled_from(Action)


def properties(of: SearchStrategy[Digest]) -> SearchStrategy[Property]:
    return st.builds(Property, st.sampled_from(BOOLEAN_TYPES)) | st.builds(Property, st.sampled_from(DIGEST_TYPES), of)


def rules(
    of: SearchStrategy[Digest] = digests, about: SearchStrategy[Operation] = operations, at_most: int = 6
) -> SearchStrategy[Rule]:
    return st.builds(Rule, about, st.lists(properties(of), max_size=at_most).map(tuple), actions)


any_rules = rules()


def policies(of: SearchStrategy[Rule] = any_rules, max_rules: int = 12) -> SearchStrategy[Policy]:
    """Every policy that a text can give: complete defaults, global or one for each operation or both."""
    some = st.dictionaries(operations, actions)
    every = st.fixed_dictionaries(dict.fromkeys(Operation, actions))
    some_rules = st.lists(of, max_size=max_rules).map(tuple)
    with_global = st.builds(Policy, words, versions, some_rules, some, actions)
    without = st.builds(Policy, words, versions, some_rules, every, st.none())
    return with_global | without


facts = st.builds(
    Facts,
    boot_verified=st.booleans(),
    dmverity_roothash=st.none() | few_digests,
    dmverity_signature=st.booleans(),
    fsverity_digest=st.none() | few_digests,
    fsverity_signature=st.booleans(),
)
