"""What comes of a text, as a value."""

from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.rule import Policy


def outcome(text: bytes) -> Policy | PolicyError:
    """Parse; return the policy, or the error instead of raising it."""
    try:
        return parse_policy(text)
    except PolicyError as error:
        return error
