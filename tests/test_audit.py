"""The words of audit records, oddities included."""

from ipe_emu import audit
from ipe_emu.audit import AuditedPolicy, AuditRecord, RecordType
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Digest
from ipe_emu.policy.rule import Action, Operation, Policy, Property, PropertyType, Rule, Version


def policy(name: str) -> AuditedPolicy:
    return AuditedPolicy(Policy(name, Version(1, 2, 3), (), {}, Action.DENY), b"")


def test_an_untrusted_string_with_anything_unusual_is_hex() -> None:
    assert audit.untrusted_string(b"/bin/sh") == b'"/bin/sh"'
    assert audit.untrusted_string(b"") == b'""'
    for odd in (b"a b", b'a"b', b"a\nb", b"a\x7fb", "é".encode()):
        assert audit.untrusted_string(odd) == odd.hex().upper().encode()


def test_a_digest_in_a_rule_keeps_its_inner_quotes() -> None:
    rule = Rule(
        Operation.EXECUTE,
        (
            Property(PropertyType.DMV_ROOTHASH, Digest("sha256", b"\xea\x67")),
            Property(PropertyType.BOOT_VERIFIED_FALSE),
        ),
        Action.ALLOW,
    )
    expected = b'op=EXECUTE dmverity_roothash="sha256":EA67 boot_verified=FALSE action=ALLOW'
    assert audit.rule_text(rule) == expected


def test_an_event_without_a_file_has_question_marks() -> None:
    record = audit.access(
        Operation.KMODULE,
        Hook.KERNEL_LOAD,
        enforcing=True,
        subject=Subject(7, b"my sh"),
        file=None,
        rule=b"DEFAULT action=DENY",
    )
    assert record.type is RecordType.IPE_ACCESS
    assert record.text == (
        b"ipe_op=KMODULE ipe_hook=KERNEL_LOAD enforcing=1 pid=7 comm=6D79207368 path=? dev=? ino=?"
        b' rule="DEFAULT action=DENY"'
    )


def test_an_event_with_a_file_names_it() -> None:
    file = File(b"/memfd:a b (deleted)", "tmpfs", 5)
    record = audit.access(
        Operation.EXECUTE,
        Hook.MMAP,
        enforcing=False,
        subject=Subject(7, b"sh"),
        file=file,
        rule=audit.default_text(Action.DENY, Operation.EXECUTE),
    )
    assert b' path=2F6D656D66643A612062202864656C6574656429 dev="tmpfs" ino=5 ' in record.text
    assert record.text.endswith(b' rule="DEFAULT op=EXECUTE action=DENY"')


def test_a_policys_name_is_never_hex() -> None:
    record = audit.policy_load(policy('\xe9"x'), auid=1000, ses=2, with_errno=False)
    assert record.text.startswith(b'policy_name="\xe9"x" policy_version=1.2.3 policy_digest=sha256:E3B0C442')
    assert record.text.endswith(b" auid=1000 ses=2 lsm=ipe res=1")


def test_the_first_activation_has_no_old_policy() -> None:
    record = audit.policy_activation(None, policy("A"), auid=audit.UNSET_ID, ses=audit.UNSET_ID)
    assert record.text.startswith(
        b"old_active_pol_name=? old_active_pol_version=? old_policy_digest=? new_active_pol_name="
    )
    assert b" auid=4294967295 ses=4294967295 " in record.text


def test_a_change_of_enforce_is_two_records_and_the_second_is_empty() -> None:
    first, second = audit.enforce_change(new=False, old=True, auid=0, ses=1)
    assert first.text == b"enforcing=0 old_enforcing=1 auid=0 ses=1 enabled=1 old-enabled=1 lsm=ipe res=1"
    assert second == AuditRecord(RecordType.MAC_STATUS, b"")


def test_a_line_is_what_auditd_stores() -> None:
    record = AuditRecord(RecordType.IPE_POLICY_LOAD, b"policy_name=?")
    assert audit.format_line(record, time_ns=1_700_000_000_045_999_999, serial=9) == (
        b"type=IPE_POLICY_LOAD msg=audit(1700000000.045:9): policy_name=?\n"
    )
