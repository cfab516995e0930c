"""The names of the mistakes that people make: what a failed write, a denial or an end comes from, in a few words."""

import errno
from collections.abc import Iterable, Mapping
from typing import Final

from attrs import frozen

from ipe_emu.policy.rule import Operation, Policy
from ipe_emu.rehearse.events import ControlFailed, Event, Judged, Message, Panicked, PolicyLoaded, Rebooted

_SIGNED: Final = b"\x30"
#: What a policy, or the path of one, begins with.
_BEGINNINGS: Final = (_SIGNED, b"policy_name", b"#", b"/")
#: What tools write at once, and so where a larger policy is cut: tee, systemd, busybox, coreutils.
_PIECES: Final = {8192: "tee", 16384: "systemd", 65536: "busybox cat", 131072: "cat"}
_PIECE_ADVICE: Final = "one write(2) must carry the whole policy, as `cat FILE >new_policy` does"
_MOST_SIGNED: Final = 65535


@frozen
class Standing:
    """What was in force when something happened: the active policy, and whether the real root was in place."""

    policy: Policy | None
    switched: bool


def declared_size(head: bytes) -> int | None:
    """Return how long a DER message says that it is, from its first bytes; None for anything else."""
    if len(head) < 2 or head[:1] != _SIGNED:
        return None
    first = head[1]
    if first < 0x80:
        return 2 + first
    count = first & 0x7F
    if not 1 <= count <= 4 or len(head) < 2 + count:
        return None
    return 2 + count + int.from_bytes(head[2 : 2 + count], "big")


def loads(event: ControlFailed) -> bool:
    """Tell whether it was a policy that should have been loaded."""
    return event.node.endswith(("new_policy", "update"))


def series_of_writes(happened: Iterable[Event]) -> Mapping[int, int]:
    """Find policies that one process wrote with more than one write(2): by the ``id`` of an event, how many.

    A write that does not begin as a policy does goes on with what the same process wrote before, which can have been
    taken for a whole policy, and loaded.
    """
    writes: dict[int, list[Event]] = {}
    found: dict[int, int] = {}
    for event in happened:
        if event.by is None or not (
            isinstance(event, PolicyLoaded) or (isinstance(event, ControlFailed) and loads(event))
        ):
            continue
        before = writes.setdefault(event.by.pid, [])
        if isinstance(event, PolicyLoaded) or event.head.lstrip().startswith(_BEGINNINGS):
            before.clear()
        before.append(event)
        if len(before) > 1:
            found |= {id(one): len(before) for one in before}
    return found


def in_pieces(event: ControlFailed, series: Mapping[int, int]) -> str | None:
    """Say that a write carried a part of a policy, if it did."""
    if not loads(event):
        return None
    declared = declared_size(event.head)
    if declared is not None and event.size < declared:
        return f"policy written in pieces: {event.size} of {declared} bytes at once; {_PIECE_ADVICE}"
    if id(event) in series:
        return f"policy written in pieces: {series[id(event)]} writes; {_PIECE_ADVICE}"
    if event.size in _PIECES and not event.head.startswith(b"/"):
        return f"policy written in pieces of {event.size} bytes, as {_PIECES[event.size]} does; {_PIECE_ADVICE}"
    return None


def of_write(event: ControlFailed, series: Mapping[int, int]) -> str:  # noqa: PLR0912 - one name for each answer
    """Name what is behind a failed write to a node; ``series`` as `series_of_writes` gives it."""
    if pieces := in_pieces(event, series):
        return pieces
    if event.in_text:
        return "policy that does not parse"
    loading = loads(event)
    signed = event.head.startswith(_SIGNED)
    match event.errno:
        case errno.EBADMSG if loading and not signed:
            return "unsigned policy: this kernel, or its active policy, admits none"
        case errno.EBADMSG if loading:
            return "damaged policy: it is no message, or not the text, that was signed"
        case errno.EACCES if loading and not signed:
            return "unsigned policy: the active policy does not trust the program that wrote it (op=POLICY)"
        case errno.ENOKEY:
            return "signing key not trusted: it is in none of the kernel's keyrings, nor is one that vouches for it"
        case errno.EKEYREJECTED:
            return "signature rejected: the key is revoked, may not sign, or does not fit"
        case errno.ENOPKG:
            return "signature with an algorithm that this kernel lacks"
        case errno.EMSGSIZE:
            return f"signed policy too large: the kernel takes {_MOST_SIGNED} bytes"
        case errno.EEXIST:
            return "policy already loaded: a newer version of it goes into its `update`"
        case errno.ESTALE if event.node.endswith("active"):
            return "older policy version: it must not be lower than that of the active policy"
        case errno.ESTALE:
            return "older policy version: an update must be newer than what is loaded"
        case errno.EINVAL if event.node.endswith("update") and "is named" in event.reason:
            return "another policy's name: an update must have the name of what it replaces"
        case errno.EPERM if event.node.endswith("delete"):
            return "active policy cannot be deleted: activate another first"
        case errno.EPERM:
            return "no CAP_MAC_ADMIN: whoever opened the node had it not"
        case errno.ENOENT:
            return "deleted policy: there is none of this name any more"
        case errno.ENOMEM:
            return "write too large: the kernel takes less than 4 MiB at once"
    return "failed write"


def of_denial(event: Judged, standing: Standing) -> str:
    """Name what is behind a denial."""
    if event.operation is Operation.POLICY:
        return "program not trusted to load policies"
    if event.operation is Operation.KMODULE:
        return "kernel module not trusted"
    if event.operation in {Operation.KEXEC_IMAGE, Operation.KEXEC_INITRAMFS}:
        return "kernel for kexec not trusted"
    if event.operation is Operation.FIRMWARE:
        return "firmware not trusted"
    file = event.file
    if file is None:
        return "executable memory without a file"
    facts = file.facts
    if facts.boot_verified and not standing.switched:
        return "policy activated too early: it does not trust the initramfs, which still runs"
    if facts.boot_verified:
        return "program of the initramfs executed under the policy of the real root"
    if facts.dmverity_roothash is not None:
        if _trusts_another_root_hash(standing.policy):
            return "root hash of another image: the policy does not name this volume's"
        if not facts.dmverity_signature:
            return "volume whose root hash nobody signed"
        return "verified volume that the policy does not trust"
    if facts.fsverity_digest is not None:
        return "sealed file that the policy does not trust"
    return f"unverified file executed: {file.dev} is neither the initramfs nor a verified volume"


def of_end(event: Panicked | Rebooted) -> str | None:
    """Name what is behind an end of the machine that nobody wants; None where its own words say it."""
    if not isinstance(event, Panicked):
        return None
    _, found, code = event.message.partition("exitcode=0x")
    if not found:
        return None
    status = int(code[:8], 16)
    if status & 0x7F:
        return f"init was killed by signal {status & 0x7F}"
    said = {126: ": a program could not be executed", 127: ": a program was not found"}
    return f"init ended, with status {status >> 8}{said.get(status >> 8, '')}"


def of_message(event: Message) -> str | None:
    """Name what is behind a line of the kernel's log: a verity volume that its root hash, or nobody, vouches for."""
    text = event.text
    if text.startswith("device-mapper: verity:") and "corrupted" in text:
        return "root hash of another image, or a tampered volume" if "root hash is" in text else "tampered volume"
    if not text.startswith("device-mapper:") or "there is no key" in text:
        return None
    if text.endswith("(ENOKEY)"):
        return (
            "root hash without a signature"
            if "require_signatures" in text
            else "root hash signed by a key that is not trusted"
        )
    return "root hash signature rejected" if text.endswith("(EKEYREJECTED)") else None


def _trusts_another_root_hash(policy: Policy | None) -> bool:
    return policy is not None and any(
        prop.type.value.startswith("dmverity_roothash") for rule in policy.rules for prop in rule.properties
    )
