"""A policy in a file: its text, whether it is signed, and whether the signature was verified."""

import argparse
import errno

from attrs import frozen

from ipe_emu.cli.files import name_of, read_bounded
from ipe_emu.cli.options import POLICY_LIMIT, has_keys, keyrings_of
from ipe_emu.errors import KernelError
from ipe_emu.policy.parse import check_name, parse_policy
from ipe_emu.policy.rule import Policy
from ipe_emu.profiles import Profile

#: The first octet of a signed policy, and of no text that the parser would take.
_ASN1_SEQUENCE = b"\x30"


@frozen
class Source:
    """A policy that was read. ``signature`` is ``none``, ``verified`` or ``not verified`` (no keys were given)."""

    name: str
    data: bytes
    text: bytes
    policy: Policy
    signature: str

    def remark(self, profile: Profile) -> str:
        """What a person should know of the signature."""
        if self.signature == "none":
            loaded = "signed only" if not profile.unsigned_policies else "signed, or where op=POLICY admits its writer"
            return f"not signed: a boot policy may be; new_policy and update take it {loaded}"
        if self.signature == "verified":
            return "signature verified"
        return "signature not verified: no keys were given (--builtin-keys …)"


def read_source(path: str, args: argparse.Namespace, profile: Profile) -> Source:
    """Read, verify (if there are keys) and parse the policy in the file ``path``.

    Raises UserError if it cannot be read, KernelError with what a kernel answers to its signature, PolicyError with
    what it answers to its text.
    """
    name = name_of(path)
    data = read_bounded(path, POLICY_LIMIT, "a policy")
    if data[:1] != _ASN1_SEQUENCE:
        text, signature = data, "none"
    else:
        text, signature = _open_signed(data, args, profile)
    policy = parse_policy(text, filename=name)
    check_name(policy.name)
    return Source(name, data, text, policy, signature)


def _open_signed(data: bytes, args: argparse.Namespace, profile: Profile) -> tuple[bytes, str]:
    from ipe_emu.pkcs7 import parse_signed_data, verify_pkcs7_signature  # cryptography is slow to import

    if not has_keys(args):
        content = parse_signed_data(data, profile.unavailable_hashes).content
        if content is None:
            raise KernelError(errno.ENODATA, "there is no content in the signed message", "pkcs7_get_content_data")
        return content, "not verified"
    keyrings = keyrings_of(args, profile)
    return verify_pkcs7_signature(data, keyrings, unavailable_hashes=profile.unavailable_hashes), "verified"
