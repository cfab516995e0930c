"""Audit records as IPE words them, oddities included (kernel: security/ipe/audit.c, kernel/audit.c).

Pure: these functions make records; what becomes of a record is its caller's affair.
"""

import enum
import hashlib

from attrs import frozen

from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Digest
from ipe_emu.policy.rule import Action, Operation, Policy, Rule

#: auid and ses of a process that never logged in.
UNSET_ID = 0xFFFFFFFF

_PLAIN = frozenset(range(0x21, 0x7F)) - {ord('"')}


class RecordType(enum.IntEnum):
    """The types of the records that IPE writes (include/uapi/linux/audit.h)."""

    MAC_STATUS = 1404
    IPE_ACCESS = 1420
    IPE_CONFIG_CHANGE = 1421
    IPE_POLICY_LOAD = 1422


@frozen
class AuditRecord:
    """One record: its type and the text after ``audit(...): ``."""

    type: RecordType
    text: bytes


@frozen
class AuditedPolicy:
    """What records say of a policy. ``signed_data`` is what its digest covers: the whole PKCS#7 message.

    The boot policy has none, and the kernel then prints the digest of nothing. An unsigned policy that op=POLICY
    admitted is covered by its text.
    """

    policy: Policy
    signed_data: bytes

    def _words(self, name: str, version: str, digest: str) -> bytes:
        # audit_policy() prints the name with %s between quotes: unlike a path it is never written in hex.
        sha256 = hashlib.sha256(self.signed_data).hexdigest().upper()
        return (
            f'{name}="'.encode()
            + self.policy.name.encode("latin-1")
            + f'" {version}={self.policy.version} {digest}=sha256:{sha256}'.encode()
        )


def untrusted_string(value: bytes) -> bytes:
    """Quote ``value``, or give it in hex if it holds a quote, white space, or anything that is not printable ASCII.

    Kernel: ``audit_log_untrustedstring()``.
    """
    if _PLAIN.issuperset(value):
        return b'"' + value + b'"'
    return value.hex().upper().encode()


def rule_text(rule: Rule) -> bytes:
    """Render a rule as 1420 records do; a digest keeps the quotes that ``ipe_digest_audit()`` puts around its name."""
    words = [f"op={rule.operation.value}".encode()]
    words += [p.type.value.encode() + (_digest(p.digest) if p.digest else b"") for p in rule.properties]
    words.append(f"action={rule.action.value}".encode())
    return b" ".join(words)


def _digest(digest: Digest) -> bytes:
    return untrusted_string(digest.algorithm.encode("latin-1")) + b":" + digest.value.hex().upper().encode()


def default_text(action: Action, operation: Operation | None = None) -> bytes:
    """Render a default as 1420 records do: an operation's own, or the global one."""
    scope = f"op={operation.value} " if operation else ""
    return f"DEFAULT {scope}action={action.value}".encode()


def access(
    operation: Operation, hook: Hook, *, enforcing: bool, subject: Subject, file: File | None, rule: bytes
) -> AuditRecord:
    """A 1420 record (``ipe_audit_match()``): the answer that a policy gave to one event."""
    text = f"ipe_op={operation.value} ipe_hook={hook.value} enforcing={int(enforcing)} pid={subject.pid} comm=".encode()
    text += untrusted_string(subject.comm)
    if file is None:
        text += b" path=? dev=? ino=?"
    else:
        dev = untrusted_string(file.dev.encode("utf-8", "surrogateescape"))
        text += b" path=" + untrusted_string(file.path) + b" dev=" + dev + b" ino=%d" % file.ino
    return AuditRecord(RecordType.IPE_ACCESS, text + b' rule="' + rule + b'"')


def policy_activation(old: AuditedPolicy | None, new: AuditedPolicy, *, auid: int, ses: int) -> AuditRecord:
    """A 1421 record (``ipe_audit_policy_activation()``): another policy is the active one."""
    if old is None:
        before = b"old_active_pol_name=? old_active_pol_version=? old_policy_digest=?"
    else:
        before = old._words("old_active_pol_name", "old_active_pol_version", "old_policy_digest")
    after = new._words("new_active_pol_name", "new_active_pol_version", "new_policy_digest")
    return AuditRecord(RecordType.IPE_CONFIG_CHANGE, before + b" " + after + _by(auid, ses) + b" lsm=ipe res=1")


def policy_load(policy: AuditedPolicy, *, auid: int, ses: int, with_errno: bool) -> AuditRecord:
    """A 1422 record (``ipe_audit_policy_load()``): a policy was loaded or updated."""
    words = policy._words("policy_name", "policy_version", "policy_digest")
    return AuditRecord(
        RecordType.IPE_POLICY_LOAD,
        words + _by(auid, ses) + b" lsm=ipe res=1" + (b" errno=0" if with_errno else b""),
    )


def policy_load_failed(errno: int, *, auid: int, ses: int) -> AuditRecord:
    """A 1422 record for a load that failed, as kernels from 6.13 on write it."""
    words = b"policy_name=? policy_version=? policy_digest=?"
    return AuditRecord(RecordType.IPE_POLICY_LOAD, words + _by(auid, ses) + b" lsm=ipe res=0" + b" errno=-%d" % errno)


def enforce_change(*, new: bool, old: bool, auid: int, ses: int) -> tuple[AuditRecord, AuditRecord]:
    """The two 1404 records of a change of ``enforce``.

    ``ipe_audit_enforce()`` starts a record, writes a second one whole, and then ends the first without a word in it.
    """
    text = b"enforcing=%d old_enforcing=%d" % (new, old) + _by(auid, ses) + b" enabled=1 old-enabled=1 lsm=ipe res=1"
    return AuditRecord(RecordType.MAC_STATUS, text), AuditRecord(RecordType.MAC_STATUS, b"")


def _by(auid: int, ses: int) -> bytes:
    return b" auid=%d ses=%d" % (auid, ses)


def format_line(record: AuditRecord, *, time_ns: int, serial: int) -> bytes:
    """The line auditd stores for ``record``, newline included, so that ausearch(8) reads it.

    ``time_ns`` is nanoseconds since the epoch.
    """
    seconds, rest = divmod(time_ns, 10**9)
    stamp = f"{seconds}.{rest // 10**6:03}:{serial}"
    return f"type={record.type.name} msg=audit({stamp}): ".encode() + record.text + b"\n"
