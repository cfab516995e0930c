"""Turn a policy back into text that parses to the same policy."""

import re

from ipe_emu.integrity.facts import Digest
from ipe_emu.policy.rule import Action, Operation, Policy, Property, Rule

# What would end a token, a line, the part before a comment, or the text.
_NO_WORD = re.compile("[ \t\n\r#\0]")


def render(policy: Policy) -> bytes:
    """Return a text with ``parse_policy(render(policy)) == policy``.

    Raises ValueError for a policy that no text describes: a name or an algorithm with a blank in it, a missing
    digest, an operation without any default. A policy that came from ``parse_policy`` always renders.
    """
    for operation in Operation:
        policy.effective_default(operation)
    version = policy.version
    if not all(0 <= part <= 0xFFFF for part in (version.major, version.minor, version.rev)):
        raise ValueError(f"the version {version} has a part that is no u16")
    lines = [f"policy_name={_word(policy.name, 'the policy name')} policy_version={version}"]
    if policy.default is not None:
        lines.append(default_statement(None, policy.default))
    lines += [default_statement(operation, action) for operation, action in policy.defaults.items()]
    lines += map(statement, policy.rules)
    return "".join(f"{line}\n" for line in lines).encode("latin-1")


def statement(rule: Rule) -> str:
    """Return a rule as one line of a policy, without the line's end; raises ValueError as ``render`` does.

    A character is a byte (latin-1), as in ``Digest.algorithm``.
    """
    properties = "".join(f"{property_statement(prop)} " for prop in rule.properties)
    return f"op={rule.operation.value} {properties}action={rule.action.value}"


def property_statement(prop: Property) -> str:
    """Return a property as it stands in a rule; raises ValueError as ``render`` does."""
    if not prop.type.value.endswith("="):
        return prop.type.value
    if prop.digest is None:
        raise ValueError(f"a property {prop.type.value} without a digest")
    return f"{prop.type.value}{_digest(prop.digest)}"


def default_statement(operation: Operation | None, action: Action) -> str:
    """Return a default as one line of a policy: an operation's, or the global one for None."""
    return f"DEFAULT op={operation.value} action={action.value}" if operation else f"DEFAULT action={action.value}"


def _digest(digest: Digest) -> str:
    if ":" in digest.algorithm:
        raise ValueError(f"the algorithm {digest.algorithm!r} has a colon, which ends its name")
    if digest.algorithm:
        _word(digest.algorithm, "the algorithm")
    return str(digest)


def _word(text: str, what: str) -> str:
    if not text or _NO_WORD.search(text) or any(ord(character) > 0xFF for character in text):
        raise ValueError(f"{what} {text!r} is not one word of bytes")
    return text
