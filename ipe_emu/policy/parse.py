"""Parse a policy's text as the kernel does, byte for byte (security/ipe/policy_parser.c).

What decides the kernel's answer is the order of its checks, so they are made in the same order here: line by line,
token by token from the left, the action last, the completeness of the defaults at the end.
"""

import binascii
import errno
import re

from ipe_emu.errors import KernelError
from ipe_emu.integrity.facts import Digest
from ipe_emu.policy import faults
from ipe_emu.policy.errors import PolicyError
from ipe_emu.policy.faults import Fault
from ipe_emu.policy.rule import Action, Operation, Policy, Position, Property, PropertyType, Rule, Version

NAME_MAX = 255
U16_MAX = 0xFFFF
U64_MAX = 0xFFFF_FFFF_FFFF_FFFF

# The kernel's isspace() goes by Latin-1, where 0xA0 is a space. It is applied to the end of a line only;
# between tokens nothing but a blank and a tab separates (IPE_POLICY_DELIM).
TRAILING_SPACE = b"\t\n\v\f\r \xa0"

DEFAULT = b"DEFAULT"
NAME_PREFIX = b"policy_name="
VERSION_PREFIX = b"policy_version="
OPERATIONS = {f"op={operation.value}".encode(): operation for operation in Operation}
ACTIONS = {f"action={action.value}".encode(): action for action in Action}
BOOLEAN_PROPERTIES = {kind.value.encode(): kind for kind in PropertyType if not kind.value.endswith("=")}
DIGEST_PROPERTIES = {kind.value.removesuffix("=").encode(): kind for kind in PropertyType if kind.value.endswith("=")}
_VERSION_PART = re.compile(rb"\+?([0-9]+)")
_VERSION_PARTS = 3
_U64_OVERFLOWS = 21  # a number with as many significant digits is over U64_MAX


def parse_policy(text: bytes, *, filename: str = "<policy>") -> Policy:
    """Return the policy that ``text`` describes (kernel: ``ipe_parse_policy``).

    Lines end with a line feed, a carriage return or both; positions count them as a text editor does, and columns in
    bytes. From a NUL byte on everything is ignored, as the kernel's string functions do. The work is linear in the
    length of the text.

    Raises PolicyError with EBADMSG, EINVAL (a version or a digest that is no number), ERANGE (a version part over
    65535) or ENOMEM (a text of 4 MiB or more: ``kmemdup_nul``); ``filename`` is for its message.
    """
    try:
        if len(text) > faults.MAX_TEXT:
            raise _error(errno.ENOMEM, Position(1, 1), faults.too_long(len(text)), "ipe_parse_policy")
        return _Parser().parse(text)
    except PolicyError as error:
        error.filename = filename
        raise


def check_name(name: str) -> None:
    """Refuse a policy name that no directory of securityfs can have.

    For new_policy, after parsing and before looking whether the name exists (EEXIST); ``update`` never gets here,
    because its policy has the name of one that is loaded. Raises KernelError with EACCES (``.``, ``..`` and names with
    a slash: ``lookup_one_len``, now ``lookup_noperm``), then ENAMETOOLONG (over 255 bytes: ``simple_lookup``).
    """
    if name in {".", ".."} or "/" in name:
        raise KernelError(
            errno.EACCES, f"the policy name {name[:60]!r} cannot be a directory of policies/", "lookup_noperm_common"
        )
    if len(name) > NAME_MAX:
        raise KernelError(
            errno.ENAMETOOLONG,
            f"the policy name has {len(name)} bytes; a file name has {NAME_MAX} at most",
            "simple_lookup",
        )


class _Parser:
    """The state of one parse: what ``struct ipe_parsed_policy`` holds while it is being filled."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.version: Version | None = None
        self.header_position = Position(1, 1)
        self.rules: list[Rule] = []
        self.defaults: dict[Operation, Action] = {}
        self.default: Action | None = None
        self.default_positions: dict[Operation | None, Position] = {}
        self.algorithms: dict[bytes, str] = {}

    def parse(self, text: bytes) -> Policy:
        # strsep() stops at the first NUL, whatever the length of the text says.
        seen = text.partition(b"\0")[0]
        # "\r" and "\n" separate lines alike and empty lines count for nothing, so CRLF may be taken as one.
        lines = seen.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\t", b" ").split(b"\n")
        commented = b"#" in seen
        for number, whole in enumerate(lines, 1):
            line = whole.partition(b"#")[0] if commented else whole
            line = line.rstrip(TRAILING_SPACE)
            if not line:
                continue
            if self.version is None:
                self._parse_header(line, number)
            else:
                self._parse_rule(line, number, whole)
        if self.name is None or self.version is None:
            raise _error(errno.EBADMSG, Position(1, 1), faults.no_header(text), "ipe_parse_policy")
        self._validate()
        return Policy(
            self.name,
            self.version,
            tuple(self.rules),
            self.defaults,
            self.default,
            self.header_position,
            self.default_positions,
        )

    def _parse_header(self, line: bytes, number: int) -> None:
        """Take ``policy_name=… policy_version=…``, in this order and nothing else (kernel: ``parse_header``)."""
        column = 1
        for token in line.split(b" "):
            position = Position(number, column)
            column += len(token) + 1
            if not token:
                continue
            if self.name is None:
                # match_token()'s %s takes at least one byte: an empty name is no name.
                if not token.startswith(NAME_PREFIX) or token == NAME_PREFIX:
                    raise _error(errno.EBADMSG, position, faults.name(token), "parse_header")
                self.name = token.removeprefix(NAME_PREFIX).decode("latin-1")
                self.header_position = position
            elif self.version is None:
                if not token.startswith(VERSION_PREFIX) or token == VERSION_PREFIX:
                    raise _error(errno.EBADMSG, position, faults.version(token), "parse_header")
                self.version = _parse_version(token, position)
            else:
                raise _error(errno.EBADMSG, position, faults.header_surplus(token), "parse_header")
        if self.version is None:
            raise _error(errno.EBADMSG, Position(number, len(line) + 1), faults.version(b""), "parse_header")

    def _parse_rule(self, line: bytes, number: int, whole: bytes) -> None:
        """Take a rule or a default: the tokens from the left, then the last one as the action (``parse_rule``)."""
        tokens = line.split(b" ")
        last = tokens.pop()
        operation: Operation | None = None
        properties: list[Property] = []
        start = 0  # the column of the first token; 0 before it was met
        is_default = False
        column = 1
        for token in tokens:
            if token:
                if operation is not None:
                    properties.append(self._parse_property(token, number, column))
                elif token == DEFAULT and not start:
                    is_default = True
                    start = column
                else:
                    operation = OPERATIONS.get(token)
                    if operation is None:
                        fault = faults.operation(token)
                        raise _error(errno.EBADMSG, Position(number, column), fault, "parse_operation")
                    start = start or column
            column += len(token) + 1
        action = ACTIONS.get(last)
        if action is None:
            fault = faults.action(last, commented=b"#" in whole)
            raise _error(errno.EBADMSG, Position(number, column), fault, "parse_action")
        position = Position(number, start or column)
        if is_default:
            if properties:
                fault = faults.default_with_properties()
                raise _error(errno.EBADMSG, Position(number, properties[0].column), fault, "parse_rule")
            self._add_default(operation, action, position)
        elif operation is None:
            raise _error(errno.EBADMSG, position, faults.operation(last), "parse_rule")
        else:
            self.rules.append(Rule(operation, tuple(properties), action, position))

    def _parse_property(self, token: bytes, number: int, column: int) -> Property:
        """Take one property (kernel: ``parse_property``)."""
        kind = BOOLEAN_PROPERTIES.get(token)
        if kind is not None:
            return Property(kind, None, column)
        key, _, value = token.partition(b"=")
        kind = DIGEST_PROPERTIES.get(key)
        if kind is None or not value:  # %s takes at least one byte here, too
            raise _error(errno.EBADMSG, Position(number, column), faults.property_(token), "parse_property")
        algorithm, colon, digits = value.partition(b":")
        if not colon:
            raise _error(errno.EBADMSG, Position(number, column), faults.digest(token), "ipe_digest_parse")
        name = self.algorithms.get(algorithm)
        if name is None:
            name = self.algorithms.setdefault(algorithm, algorithm.decode("latin-1"))
        try:
            # Strict as hex2bin(): digits of either case and no blanks; none at all is a digest of length 0.
            # An odd number of them makes it read the terminating NUL as a digit, hence EINVAL as well.
            return Property(kind, Digest(name, binascii.unhexlify(digits)), column)
        except ValueError:
            raise _error(errno.EINVAL, Position(number, column), faults.digest(token), "ipe_digest_parse") from None

    def _add_default(self, operation: Operation | None, action: Action, position: Position) -> None:
        """Keep a default; there may be one of each kind (kernel: the end of ``parse_rule``)."""
        if operation in self.default_positions:
            fault = faults.default_twice(operation, self.default_positions[operation])
            raise _error(errno.EBADMSG, position, fault, "parse_rule")
        self.default_positions[operation] = position
        if operation is None:
            self.default = action
        else:
            self.defaults[operation] = action

    def _validate(self) -> None:
        """Refuse a policy that leaves an operation without an answer (kernel: ``validate_policy``)."""
        missing = [operation for operation in Operation if operation not in self.defaults]
        if self.default is None and missing:
            raise _error(errno.EBADMSG, self.header_position, faults.no_default(missing), "validate_policy")


def _parse_version(token: bytes, position: Position) -> Version:
    """Take ``policy_version=MAJOR.MINOR.REV`` (kernel: ``parse_version``)."""
    parts: list[int] = []
    column = position.column + len(VERSION_PREFIX)
    text = token.removeprefix(VERSION_PREFIX).split(b".")
    for part in text:
        here = Position(position.line, column)
        if len(parts) == _VERSION_PARTS:
            raise _error(errno.EBADMSG, here, faults.version_parts(len(text)), "parse_version")
        parts.append(_kstrtou16(part, here))
        column += len(part) + 1
    if len(parts) != _VERSION_PARTS:
        raise _error(errno.EBADMSG, position, faults.version_parts(len(text)), "parse_version")
    major, minor, rev = parts
    return Version(major, minor, rev)


def _kstrtou16(part: bytes, position: Position) -> int:
    """Take a decimal u16, as the kernel's function of this name does: one ``+`` may precede it."""
    digits = _VERSION_PART.match(part)
    if digits is None:
        raise _error(errno.EINVAL, position, faults.version_part(part), "kstrtou16")
    significant = digits[1].lstrip(b"0")
    # Digits that overflow 64 bits are ERANGE whatever follows them; between that and 16 bits, junk behind them
    # is looked at first. A number of 21 digits overflows in any case, so int() never sees a long one.
    value = int(significant[:_U64_OVERFLOWS] or b"0")
    if value > U64_MAX:
        raise _error(errno.ERANGE, position, faults.version_part(part), "kstrtoull")
    if digits.end() != len(part):
        raise _error(errno.EINVAL, position, faults.version_part(part), "kstrtoull")
    if value > U16_MAX:
        raise _error(errno.ERANGE, position, faults.version_part(part), "kstrtou16")
    return value


def _error(number: int, position: Position, fault: Fault, function: str) -> PolicyError:
    where = Position(position.line, position.column + fault.offset)
    return PolicyError(number, fault.reason, where, suggestion=fault.suggestion, function=function)
