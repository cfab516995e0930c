"""What is wrong with a token, in words, and what was probably meant.

The parser decides the errno and asks here only once a token is refused, so nothing here has to be fast; but a token
may be as long as a text, so whatever is more than linear looks at a bounded part of it.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from attrs import frozen

from ipe_emu.policy.rule import Operation, Position, PropertyType

MAX_TEXT = (4 << 20) - 1  # kmalloc() gives 4 MiB at most, and a NUL byte follows the text
QUOTED_BYTES = 60
ACTION_FORMS = ("action=ALLOW", "action=DENY")
OPERATION_FORMS = tuple(f"op={operation.value}" for operation in Operation)
PROPERTY_FORMS = tuple(kind.value for kind in PropertyType)
# Words that people know from elsewhere and that no spelling distance leads to.
OTHER_NAMES = {
    "MODULE": "KMODULE",
    "KERNEL_MODULE": "KMODULE",
    "EXEC": "EXECUTE",
    "BPRM_CHECK": "EXECUTE",
    "KEXEC": "KEXEC_IMAGE",
    "KEXEC_KERNEL": "KEXEC_IMAGE",
    "KEXEC_KERNEL_CHECK": "KEXEC_IMAGE",
    "KEXEC_INITRD": "KEXEC_INITRAMFS",
    "KEXEC_INITRAMFS_CHECK": "KEXEC_INITRAMFS",
    "X509": "X509_CERT",
    "CERT": "X509_CERT",
    "CERTIFICATE": "X509_CERT",
    "YES": "TRUE",
    "1": "TRUE",
    "NO": "FALSE",
    "0": "FALSE",
    "PERMIT": "ALLOW",
    "ACCEPT": "ALLOW",
    "REJECT": "DENY",
    "BLOCK": "DENY",
    "REFUSE": "DENY",
}
_NO_HEX_DIGIT = re.compile(rb"[^0-9A-Fa-f]")


@frozen
class Fault:
    """A reason and perhaps a suggestion; ``offset`` counts the bytes from the token's start to the fault."""

    reason: str
    suggestion: str = ""
    offset: int = 0


def quoted(token: bytes) -> str:
    """Show bytes from a policy so that they can do no harm to a terminal: printable ASCII as it is, shortened."""
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in token[:QUOTED_BYTES])
    return f"`{text}…`" if len(token) > QUOTED_BYTES else f"`{text}`"


def too_long(length: int) -> Fault:
    """A text that kmalloc() has no room for."""
    return Fault(
        f"the policy has {length} bytes; the kernel cannot hold more than {MAX_TEXT}", "split off what is not needed"
    )


def no_header(text: bytes) -> Fault:
    """Nothing but comments and white space, or nothing before the first NUL."""
    if not text:
        return Fault("the policy is empty", _HEADER_SUGGESTION)
    if b"\0" in text:
        return Fault(
            "there is no policy before the first NUL byte; the kernel reads no further", "save it as plain text"
        )
    return Fault("the policy has nothing but comments and white space", _HEADER_SUGGESTION)


def name(token: bytes) -> Fault:
    """The first token of the text is not ``policy_name=NAME``."""
    for mark, encoding in ((b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if token.startswith(mark):
            return Fault(f"the text starts with a byte order mark ({encoding})", "save it as plain text without one")
    if token[:1] == b"0" and token[1:2] in _DER_LENGTHS:
        return Fault("this is no text; it looks like a signed policy (DER)", "verify it first; the policy is inside")
    if token == b"policy_name=":
        return Fault("the policy name is empty", "a name is one word: policy_name=NAME", len(token))
    if token.startswith(b"policy_version="):
        return Fault("policy_version= comes before policy_name=", _HEADER_SUGGESTION)
    return Fault(f"the policy starts with {quoted(token)}, not with its header", _HEADER_SUGGESTION)


def version(token: bytes) -> Fault:
    """The second token of the header is missing (then ``token`` is empty) or not ``policy_version=VERSION``."""
    if token in {b"", b"policy_version="}:
        return Fault("the header has no policy_version=", "write, for example, policy_version=1.0.0", len(token))
    return Fault(
        f"found {quoted(token)} where policy_version= belongs",
        "the header is policy_name=NAME policy_version=MAJOR.MINOR.REV, and a name has no blanks",
    )


def header_surplus(token: bytes) -> Fault:
    """More than two tokens in the header."""
    return Fault(
        f"{quoted(token)} follows the version", "the header has a name and a version; rules go on lines of their own"
    )


def version_parts(count: int) -> Fault:
    """Not three parts."""
    return Fault(
        f"the version has {_count(count, 'part')} instead of three", "write MAJOR.MINOR.REV, for example 1.0.0"
    )


def version_part(part: bytes) -> Fault:
    """A part that is no decimal number, or one over 65535."""
    if not part:
        return Fault("a part of the version is empty", "write MAJOR.MINOR.REV, for example 1.0.0")
    if part.removeprefix(b"+").isdigit():
        return Fault(f"the version part {quoted(part)} is over 65535")
    return Fault(f"the version part {quoted(part)} is not a decimal number")


def operation(token: bytes) -> Fault:
    """A line that starts with neither an operation nor DEFAULT, or a default for an operation that does not exist."""
    if token.startswith(b"op="):
        value = token.removeprefix(b"op=")
        names = [operation.value for operation in Operation]
        return Fault(
            f"unknown operation {quoted(value)}",
            _did_you_mean(value, names) or f"the operations are {_listed(names)}",
            len(b"op="),
        )
    if token == b"DEFAULT":
        return Fault("DEFAULT stands twice", "write `DEFAULT action=DENY` or `DEFAULT op=EXECUTE action=DENY`")
    if token.startswith(b"policy_name="):
        return Fault("a second header", "a policy has one header; every policy is a write of its own")
    if token.upper() == b"DEFAULT":
        return Fault(f"a rule cannot start with {quoted(token)}", "did you mean `DEFAULT`?")
    key = token.partition(b"=")[0]
    if token.startswith(b"action="):
        return Fault("the rule names no operation", "write op=… first and action=… last")
    if key in _KEYS[1:]:
        return Fault(
            f"{quoted(token)} stands before the operation", "write op=… first, then the properties, action=… last"
        )
    return Fault(
        f"a rule cannot start with {quoted(token)}",
        _did_you_mean(token, ("DEFAULT", *OPERATION_FORMS)) or "a rule starts with op=… or DEFAULT",
    )


def action(token: bytes, *, commented: bool) -> Fault:
    """A last token that is no action; ``commented`` tells that the line goes on after a ``#``."""
    if token.startswith(b"action="):
        value = token.removeprefix(b"action=")
        if not value:
            return Fault("action= has no value", "write action=ALLOW or action=DENY", len(token))
        return Fault(
            f"unknown action {quoted(value)}",
            _did_you_mean(value, ("ALLOW", "DENY")) or "the actions are ALLOW and DENY",
            len(b"action="),
        )
    if commented:
        return Fault("the line has no action at its end", "everything from `#` on is a comment")
    meant = "" if token.upper() == b"ACTION" else _did_you_mean(token, ACTION_FORMS)
    return Fault(
        f"the line ends with {quoted(token)}, not with an action", meant or "end it with action=ALLOW or action=DENY"
    )


def property_(token: bytes) -> Fault:
    """A token between operation and action that is no property."""
    key, equals, value = token.partition(b"=")
    if token == b"DEFAULT":
        return Fault("DEFAULT stands after the operation", "write it first: DEFAULT op=EXECUTE action=DENY")
    if key == b"action":
        return Fault("something follows the action", "write action=… once, at the end of the line")
    if key == b"op":
        return Fault("a rule has one operation", "write a rule of its own for the other one")
    if key not in _KEYS:
        return Fault(
            f"unknown property {quoted(key if equals else token)}",
            _did_you_mean(key, [known.decode() for known in _KEYS]) or f"the properties are {_listed(PROPERTY_FORMS)}",
        )
    if f"{key.decode()}=" in PROPERTY_FORMS:
        return Fault(f"{key.decode()} has no value", f"write {key.decode()}=ALGORITHM:HEX", len(token))
    if not value:
        return Fault(f"{key.decode()} has no value", f"write {key.decode()}=TRUE or {key.decode()}=FALSE", len(token))
    return Fault(
        f"{key.decode()} cannot be {quoted(value)}",
        _did_you_mean(value, ("TRUE", "FALSE")) or "the values are TRUE and FALSE",
        len(key) + 1,
    )


def digest(token: bytes) -> Fault:
    """A digest that is not ``ALGORITHM:HEX``."""
    key, _, value = token.partition(b"=")
    algorithm, colon, digits = value.partition(b":")
    if not colon:
        return Fault(f"the digest {quoted(value)} names no algorithm", f"write {key.decode()}=sha256:…", len(key) + 1)
    before = len(key) + 1 + len(algorithm) + 1
    wrong = _NO_HEX_DIGIT.search(digits)
    if wrong is not None:
        return Fault(f"{quoted(wrong[0])} is no hexadecimal digit", "", before + wrong.start())
    return Fault(
        f"the digest has an odd number of digits ({len(digits)})", "two digits make a byte", before + len(digits)
    )


def default_with_properties() -> Fault:
    """A default with a property."""
    return Fault("a default has no properties", "leave DEFAULT away to make it a rule")


def default_twice(operation: Operation | None, first: Position) -> Fault:
    """A second default of the same kind."""
    what = f"op={operation.value}" if operation else "all operations"
    return Fault(f"a second default for {what}; the first is on line {first.line}", "keep one of them")


def no_default(missing: Sequence[Operation]) -> Fault:
    """Neither a global default nor one for each operation."""
    names = _listed([operation.value for operation in missing])
    return Fault(f"there is neither a global default nor one for {names}", "add the line: DEFAULT action=DENY")


def _did_you_mean(token: bytes, words: Iterable[str]) -> str:
    """Propose the nearest of ``words``, whatever the case; the empty string if none is near."""
    if len(token) > QUOTED_BYTES:
        return ""
    text = token.decode("latin-1").upper()
    by_upper = {word.upper(): word for word in words}
    known = OTHER_NAMES.get(text)
    near = [known] if known in by_upper.values() else difflib.get_close_matches(text, by_upper, n=1, cutoff=0.6)
    return f"did you mean `{by_upper[near[0].upper()]}`?" if near and near[0] else ""


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


_HEADER_SUGGESTION = "start with policy_name=NAME policy_version=MAJOR.MINOR.REV"
_DER_LENGTHS = {bytes([first]) for first in range(0x80, 0x85)}
_KEYS = (b"op", *dict.fromkeys(form.partition("=")[0].encode() for form in PROPERTY_FORMS))
