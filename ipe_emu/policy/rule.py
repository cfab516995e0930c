"""The values a policy consists of. Names follow security/ipe/policy.h."""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from attrs import field, frozen

from ipe_emu.integrity.facts import Digest


class Operation(enum.Enum):
    """What a rule is about (kernel: ``enum ipe_op_type``); the value is its name in a policy."""

    EXECUTE = "EXECUTE"
    FIRMWARE = "FIRMWARE"
    KMODULE = "KMODULE"
    KEXEC_IMAGE = "KEXEC_IMAGE"
    KEXEC_INITRAMFS = "KEXEC_INITRAMFS"
    POLICY = "POLICY"
    X509_CERT = "X509_CERT"


class Action(enum.Enum):
    """What a rule decides (kernel: ``enum ipe_action_type``)."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class PropertyType(enum.Enum):
    """The eight property forms (kernel: ``enum ipe_prop_type``); the value is the text up to a digest."""

    BOOT_VERIFIED_FALSE = "boot_verified=FALSE"
    BOOT_VERIFIED_TRUE = "boot_verified=TRUE"
    DMV_ROOTHASH = "dmverity_roothash="
    DMV_SIG_FALSE = "dmverity_signature=FALSE"
    DMV_SIG_TRUE = "dmverity_signature=TRUE"
    FSV_DIGEST = "fsverity_digest="
    FSV_SIG_FALSE = "fsverity_signature=FALSE"
    FSV_SIG_TRUE = "fsverity_signature=TRUE"


@frozen(order=True, weakref_slot=False)  # without the slot: values that come in ten thousands
class Position:
    """Where something stands in a policy's text; both count from 1, columns in bytes."""

    line: int
    column: int


@frozen(order=True)
class Version:
    """A policy's version; each part is a u16 (kernel: ``struct ipe_policy_parsed.version``)."""

    major: int
    minor: int
    rev: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.rev}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read back what ``str`` gives; for our own output, not for policies."""
        major, minor, rev = (int(part) for part in text.split("."))
        return cls(major, minor, rev)


@frozen(weakref_slot=False)
class Property:
    """One property of a rule; ``digest`` is set for DMV_ROOTHASH and FSV_DIGEST only.

    ``column`` is where it stands in the line of its rule; 0 if it was not read from a text. (A number, not a
    ``Position``: a policy may have 38,000 of them, and each object more costs the garbage collector's time.)
    """

    type: PropertyType
    digest: Digest | None = None
    column: int = field(default=0, eq=False)


@frozen(weakref_slot=False)
class Rule:
    """One rule: all its properties must hold, then ``action`` is the answer."""

    operation: Operation
    properties: tuple[Property, ...]
    action: Action
    position: Position | None = field(default=None, eq=False)

    def position_of(self, prop: Property) -> Position | None:
        """Return where one of the rule's properties stands; None if the rule was not read from a text."""
        return Position(self.position.line, prop.column) if self.position and prop.column else self.position


def _frozen_defaults(given: Mapping[Operation, Action]) -> Mapping[Operation, Action]:
    return MappingProxyType(dict(given))


def _frozen_positions(given: Mapping[Operation | None, Position]) -> Mapping[Operation | None, Position]:
    return MappingProxyType(dict(given))


@frozen(weakref_slot=False)
class Policy:
    """A parsed policy (kernel: ``struct ipe_parsed_policy``).

    ``rules`` keeps the order of the text. ``defaults`` holds the per-operation defaults that the text gives;
    ``default`` is the global one. The parser guarantees that every operation has an answer.
    ``name`` is latin-1 decoded: the kernel sees bytes.
    ``position`` is where the header stands, ``default_positions`` where the defaults do (the global one under None);
    neither takes part in comparisons.
    """

    name: str
    version: Version
    rules: tuple[Rule, ...]
    defaults: Mapping[Operation, Action] = field(converter=_frozen_defaults, hash=False)
    default: Action | None
    position: Position | None = field(default=None, eq=False)
    default_positions: Mapping[Operation | None, Position] = field(
        factory=dict, converter=_frozen_positions, eq=False, repr=False
    )

    def effective_default(self, operation: Operation) -> Action:
        """Return what an operation without a matching rule gets.

        Raises ValueError if the policy gives no answer; one that was parsed always does (kernel: ``validate_policy``).
        """
        action = self.defaults.get(operation, self.default)
        if action is None:
            raise ValueError(f"the policy {self.name} has neither a default for {operation.value} nor a global one")
        return action
