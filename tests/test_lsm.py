"""The LSM's own rules that no recording shows as a whole: the op=POLICY gate, identity, news, many writers at once."""

import errno
import threading
from collections.abc import Callable

import pytest
from attrs import evolve

from ipe_emu.audit import AuditRecord, RecordType
from ipe_emu.errors import KernelError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Facts
from ipe_emu.keyring import Keyrings
from ipe_emu.lsm import WRITE_LIMIT, Ipe, Login, Opener, PolicyAdded, PolicyRemoved, Writer, kstrtobool
from ipe_emu.policy.rule import Operation
from ipe_emu.profiles import PROFILES

INITRAMFS = File(b"/bin/cat", "rootfs", 1, Facts(boot_verified=True))
TMPFS = File(b"/run/cat", "tmpfs", 2)
ROOT = Opener(cap_mac_admin=True)
SUBJECT = Subject(1, b"init")

ADMITS_INITRAMFS = b"""policy_name=Boot policy_version=0.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=POLICY boot_verified=TRUE action=ALLOW
"""
LOCKDOWN = b"policy_name=Lockdown policy_version=1.0.0\nDEFAULT action=DENY\n"


def machine(
    boot_policy: bytes | None = ADMITS_INITRAMFS, profile: str = "op-policy", **options: bool
) -> tuple[Ipe, list[AuditRecord]]:
    records: list[AuditRecord] = []
    ipe = Ipe(keyrings=Keyrings(), emit=records.append, profile=PROFILES[profile], **options)
    if boot_policy is not None:
        ipe.load_boot_policy(boot_policy)
    return ipe, records


def writer(program: File | None = INITRAMFS, opener: Opener = ROOT) -> Writer:
    return Writer(opener, SUBJECT, lambda: program)


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(KernelError) as caught:
        call()
    return caught.value.errno or 0


def test_a_trusted_program_loads_an_unsigned_policy() -> None:
    ipe, records = machine(success_audit=True)
    assert ipe.new_policy(LOCKDOWN, writer()) == len(LOCKDOWN)
    assert [r.type for r in records] == [RecordType.IPE_ACCESS, RecordType.IPE_POLICY_LOAD]
    assert b"ipe_op=POLICY ipe_hook=POLICY_LOAD" in records[0].text
    assert errno_of(lambda: ipe.read_pkcs7(ipe.policies[1])) == errno.ENOENT
    assert [r.answer for r in ipe.upstream_refusals] == ["on linux-7.3: EBADMSG"]


@pytest.mark.parametrize(
    ("boot_policy", "program", "answer"),
    [
        (ADMITS_INITRAMFS, TMPFS, errno.EACCES),
        (b"policy_name=B policy_version=0.0.0\nDEFAULT action=ALLOW\n", INITRAMFS, errno.EBADMSG),
        (
            b"policy_name=B policy_version=0.0.0\nDEFAULT action=DENY\nDEFAULT op=POLICY action=ALLOW\n",
            INITRAMFS,
            errno.EBADMSG,
        ),
        (b"policy_name=B policy_version=0.0.0\nDEFAULT action=ALLOW\nop=POLICY action=DENY\n", INITRAMFS, errno.EACCES),
        (b"policy_name=B policy_version=0.0.0\nDEFAULT action=ALLOW\nop=POLICY action=ALLOW\n", None, errno.EACCES),
        (None, INITRAMFS, errno.EBADMSG),
    ],
    ids=["denied", "default allows", "operation default allows", "rule denies", "writer unknown", "nothing active"],
)
@pytest.mark.parametrize("enforce", [True, False], ids=["enforcing", "permissive"])
def test_the_gate_admits_by_a_matching_rule_only(
    boot_policy: bytes | None, program: File | None, answer: int, enforce: bool
) -> None:
    ipe, _ = machine(boot_policy, enforce=enforce)
    assert errno_of(lambda: ipe.new_policy(LOCKDOWN, writer(program))) == answer
    assert "Lockdown" not in [p.name for p in ipe.policies]


def test_a_damaged_signature_never_falls_back_to_the_gate() -> None:
    ipe, records = machine()
    assert errno_of(lambda: ipe.new_policy(b"\x30" + LOCKDOWN, writer())) == errno.EBADMSG
    assert [r.type for r in records] == [RecordType.IPE_POLICY_LOAD]


@pytest.mark.parametrize("default", [b"ALLOW", b"DENY"])
@pytest.mark.parametrize(
    "operation_default", [b"", b"DEFAULT op=POLICY action=ALLOW\n", b"DEFAULT op=POLICY action=DENY\n"]
)
@pytest.mark.parametrize("rule", [b"", b"op=POLICY action=DENY\n", b"op=POLICY boot_verified=FALSE action=DENY\n"])
@pytest.mark.parametrize("written", [LOCKDOWN, b"", b"\n", b"0", b"\x30\x03abc", b"nonsense"])
def test_without_an_admitting_rule_op_policy_differs_from_upstream_in_one_errno(
    default: bytes, operation_default: bytes, rule: bytes, written: bytes
) -> None:
    boot = b"policy_name=B policy_version=0.0.0\nDEFAULT action=%s\n%s%s" % (default, operation_default, rule)
    upstream, _ = machine(boot, profile="linux-7.3")
    proposal, _ = machine(boot)
    expected = errno_of(lambda: upstream.new_policy(written, writer()))
    answer = errno_of(lambda: proposal.new_policy(written, writer()))
    denies = proposal.process_event(Operation.POLICY, Hook.POLICY_LOAD, SUBJECT, INITRAMFS).errno == errno.EACCES
    is_text = written[:1] != b"\x30"
    assert answer == (errno.EACCES if denies and is_text else expected)


def test_a_path_is_an_ordinary_event_and_its_file_is_the_gates_subject() -> None:
    ipe, records = machine(success_audit=True)
    asked: list[bytes] = []

    def read(path: bytes) -> tuple[File, bytes]:
        asked.append(path)
        return evolve(INITRAMFS, path=path), LOCKDOWN

    by = Writer(ROOT, SUBJECT, lambda: TMPFS, read)
    assert ipe.new_policy(b"/etc/lockdown.pol \n", by) == len(b"/etc/lockdown.pol \n")
    assert asked == [b"/etc/lockdown.pol"]
    assert [r.text.split(b" enforcing")[0] for r in records[:2]] == [
        b"ipe_op=POLICY ipe_hook=KERNEL_READ",
        b"ipe_op=POLICY ipe_hook=POLICY_LOAD",
    ]


def test_permissive_waives_the_read_of_a_path_and_not_the_gate() -> None:
    ipe, _ = machine(enforce=False)
    by = Writer(ROOT, SUBJECT, lambda: INITRAMFS, lambda path: (evolve(TMPFS, path=path), LOCKDOWN))
    assert errno_of(lambda: ipe.new_policy(b"/run/p", by)) == errno.EACCES


def test_what_is_too_long_for_a_write_is_enomem_before_anything_is_looked_at() -> None:
    ipe, _ = machine()
    loaded = ipe.policies[0]
    for call in (ipe.new_policy, lambda data, by: ipe.update(loaded, data, by)):
        assert errno_of(lambda call=call: call(b"x" * WRITE_LIMIT, writer())) == errno.ENOMEM  # type: ignore[misc]  # default


def test_an_unsigned_update_of_an_unsigned_policy_keeps_its_directory_and_stays_active() -> None:
    ipe, records = machine()
    ipe.new_policy(b"policy_name=P policy_version=0.0.1\nDEFAULT action=ALLOW\nop=POLICY action=ALLOW\n", writer())
    loaded = ipe.policies[-1]
    ipe.setactive(loaded, b"1", writer())
    records.clear()
    ipe.update(loaded, b"policy_name=P policy_version=0.0.2\nDEFAULT action=ALLOW\n", writer())
    assert ipe.active is loaded
    assert ipe.read_version(loaded) == b"0.0.2"
    assert [r.type for r in records] == [RecordType.IPE_POLICY_LOAD, RecordType.IPE_CONFIG_CHANGE]
    assert errno_of(lambda: ipe.new_policy(LOCKDOWN, writer())) == errno.EBADMSG


def test_a_deleted_policy_answers_enoent_forever() -> None:
    ipe, _ = machine()
    ipe.new_policy(LOCKDOWN, writer())
    loaded = ipe.policies[-1]
    ipe.delete_policy(loaded, b"1", writer())
    ipe.new_policy(LOCKDOWN, writer())
    assert ipe.policies[-1] is not loaded
    for read in (ipe.getactive, ipe.read_name, ipe.read_version, ipe.read_policy, ipe.read_pkcs7):
        assert errno_of(lambda read=read: read(loaded)) == errno.ENOENT  # type: ignore[misc]  # any type
    for write in (ipe.setactive, ipe.delete_policy, ipe.update):
        assert errno_of(lambda write=write: write(loaded, b"1", writer())) == errno.ENOENT  # type: ignore[misc]  # default


def test_news_comes_after_the_change_and_without_a_lock() -> None:
    ipe, _ = machine()
    heard: list[tuple[str, bool]] = []

    def listen(news: PolicyAdded | PolicyRemoved) -> None:
        # Another thread can use the model while news is told.
        thread = threading.Thread(target=lambda: heard.append((type(news).__name__, news.loaded in ipe.policies)))
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()

    ipe.subscribe(listen)
    ipe.new_policy(LOCKDOWN, writer())
    ipe.delete_policy(ipe.policies[-1], b"1", writer())
    assert heard == [("PolicyAdded", True), ("PolicyRemoved", False)]


def test_of_many_writers_of_one_policy_exactly_one_wins() -> None:
    ipe, records = machine()
    answers: list[int] = []
    start = threading.Barrier(8)

    def write() -> None:
        start.wait()
        try:
            ipe.new_policy(LOCKDOWN, writer())
            answers.append(0)
        except KernelError as error:
            answers.append(error.errno or -1)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(answers) == [0] + [errno.EEXIST] * 7
    assert sum(b"res=1" in r.text for r in records) == 1


def test_the_openers_capability_counts() -> None:
    ipe, _ = machine()
    by = writer(opener=Opener(cap_mac_admin=False))
    loaded = ipe.policies[0]
    assert errno_of(lambda: ipe.setenforce(b"0", by)) == errno.EPERM
    assert errno_of(lambda: ipe.setaudit(b"1", by)) == errno.EPERM
    assert errno_of(lambda: ipe.new_policy(LOCKDOWN, by)) == errno.EPERM
    assert errno_of(lambda: ipe.setactive(loaded, b"x", by)) == errno.EPERM
    assert (ipe.enforce, ipe.success_audit) == (True, False)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (b"1", True),
        (b"y\n", True),
        (b"Total", True),
        (b"on", True),
        (b"oN", True),
        (b"0\n", False),
        (b"of", False),
        (b"Nein", False),
    ],
)
def test_kstrtobool(written: bytes, value: bool) -> None:
    assert kstrtobool(written) is value


@pytest.mark.parametrize("written", [b"", b"2", b" 1", b"\0001", b"o", b"o\0n", b"ox", b"\n"])
def test_kstrtobool_refuses(written: bytes) -> None:
    assert errno_of(lambda: kstrtobool(written)) == errno.EINVAL


def test_records_name_the_login_of_the_writer_and_nobody_else_asks() -> None:
    """Who opened the node does not matter: the kernel's records name ``current``."""
    ipe, records = machine()
    asked: list[Login] = []

    def login() -> Login:
        asked.append(Login(auid=1000, ses=3))
        return asked[-1]

    by = evolve(writer(), login=login)
    ipe.setenforce(b"1", by)
    assert not asked
    ipe.setenforce(b"0", by)
    assert len(asked) == 1
    assert b"auid=1000 ses=3" in records[0].text


def test_what_passes_would_be_allowed_and_leave_no_record() -> None:
    without, _ = machine(boot_policy=None)
    assert without.passes(Operation.EXECUTE, Facts())
    ipe, records = machine()
    assert ipe.passes(Operation.EXECUTE, INITRAMFS.facts)
    assert not ipe.passes(Operation.EXECUTE, Facts())
    assert not ipe.passes(Operation.KMODULE, INITRAMFS.facts)
    ipe.setenforce(b"0", writer())
    assert not ipe.passes(Operation.EXECUTE, Facts())  # allowed, and recorded
    ipe.setaudit(b"1", writer())
    assert not ipe.passes(Operation.EXECUTE, INITRAMFS.facts)
    assert [record.type for record in records] == [RecordType.MAC_STATUS] * 2
