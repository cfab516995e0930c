"""What a report says of a boot: the fault's name first, what would die, and what is to be warned of."""

import errno
from collections.abc import Sequence

import pytest

from ipe_emu.event import Hook, Subject
from ipe_emu.integrity.facts import NO_FACTS, Facts
from ipe_emu.policy.rule import Operation
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report import summarise
from ipe_emu.rehearse.report.faults import declared_size
from ipe_emu.rehearse.verdict import Result
from tests.rehearse.report.boots import (
    BOOT,
    CAT,
    FINAL,
    FINAL_TEXT,
    INITRAMFS,
    OTHER_VOLUME,
    SHELL,
    failed,
    good_boot,
    initramfs_phase,
    judged,
    started,
    with_denial,
    without_loading,
)

TEXT = b"policy_name=x policy_version=1.0.0\n"
TAMPERED = "device-mapper: verity: 254:0: data block 7 (at byte 28672) is corrupted: its digest is 00, and not 01"
ANOTHER = "device-mapper: verity: 254:0: root hash is 00, not 01: another image's, or the topmost block is corrupted"

FAULTS: dict[str, tuple[Sequence[Event], Result, str]] = {
    "unsigned": (
        without_loading(failed(errno.EBADMSG, head=TEXT[:16])),
        Result.DENIED, "unsigned policy: this kernel",
    ),
    "unsigned-untrusted-writer": (
        without_loading(failed(errno.EACCES, head=TEXT[:16])),
        Result.DENIED, "does not trust the program that wrote it",
    ),
    "key": (without_loading(failed(errno.ENOKEY)), Result.DENIED, "signing key not trusted"),
    "damaged": (without_loading(failed(errno.EBADMSG)), Result.DENIED, "damaged policy"),
    "name": (
        without_loading(failed(errno.EINVAL, "policies/a/update", reason="the update is named 'b', the policy 'a'")),
        Result.DENIED, "another policy's name",
    ),
    "older-update": (
        without_loading(failed(errno.ESTALE, "policies/a/update")),
        Result.DENIED, "an update must be newer",
    ),
    "older-active": (
        without_loading(failed(errno.ESTALE, "policies/a/active")),
        Result.DENIED, "must not be lower",
    ),
    "tee": (
        without_loading(failed(errno.EBADMSG, size=8192, head=b"\x30\x82\x23\x28" + bytes(12))),
        Result.DENIED, "policy written in pieces: 8192 of 9004 bytes at once",
    ),
    "tee-text": (
        without_loading(failed(errno.EINVAL, size=8192, head=TEXT[:16])),
        Result.DENIED, "as tee does",
    ),
    "systemd": (
        without_loading(failed(errno.EBADMSG, size=16384, head=b"\x30\x82\x50\x00")),
        Result.DENIED, "16384 of 20484 bytes",
    ),
    "too-early": (
        with_denial(judged(0.13, b"/bin/busybox", INITRAMFS, FINAL)),
        Result.DENIED, "policy activated too early",
    ),
    "initramfs-after-switch": (
        with_denial(judged(0.3, b"/bin/busybox", INITRAMFS, FINAL)),
        Result.DENIED, "under the policy of the real root",
    ),
    "root-hash": (
        with_denial(judged(0.3, b"/usr/bin/app", OTHER_VOLUME, FINAL, dev="dm-0")),
        Result.DENIED, "root hash of another image",
    ),
    "script-in-run": (
        with_denial(judged(0.3, b"/run/script", NO_FACTS, FINAL, dev="tmpfs")),
        Result.DENIED, "unverified file executed",
    ),
    "module": (
        with_denial(judged(0.3, b"/x.ko", NO_FACTS, FINAL, operation=Operation.KMODULE, hook=Hook.KERNEL_READ)),
        Result.DENIED, "kernel module not trusted",
    ),
    "not-found": (
        [*initramfs_phase(), events.Panicked(0.4, None, "Attempted to kill init! exitcode=0x00007f00")],
        Result.PROGRAM_FAILED, "init ended, with status 127: a program was not found",
    ),
    "killed": (
        [*initramfs_phase(), events.Panicked(0.4, None, "Attempted to kill init! exitcode=0x0000000b")],
        Result.PROGRAM_FAILED, "init was killed by signal 11",
    ),
    "tampered": (
        [*initramfs_phase(), events.Message(0.2, None, TAMPERED),
         events.Panicked(0.4, None, "Attempted to kill init! exitcode=0x00000100")],
        Result.PROGRAM_FAILED, "tampered volume",
    ),
    "restarted-for-corruption": (
        [*initramfs_phase(), events.Message(0.2, None, TAMPERED),
         events.Rebooted(0.2, None, events.RESTARTED_ITSELF, "restart_on_corruption of the verity device root")],
        Result.PROGRAM_FAILED, "tampered volume",
    ),
    "another-root-hash": (
        [*initramfs_phase(), events.Message(0.2, None, ANOTHER),
         events.Panicked(0.4, None, "Attempted to kill init! exitcode=0x00000100")],
        Result.PROGRAM_FAILED, "root hash of another image",
    ),
    "image": (
        [started(), events.ImageUnpacked(0.0, None, 3, 9, fault="broken padding (at byte 7)"),
         events.Panicked(0.1, None, 'VFS: Unable to mount root fs on "" or unknown-block(0,0)')],
        Result.PROGRAM_FAILED, "the image was not unpacked: broken padding",
    ),
    "image-unclear": (
        [*good_boot(), events.ImageUnpacked(0.0, None, 3, 9, fault="read error", exact=False)],
        Result.NOT_JUDGED, "Initramfs unpacking failed: read error",
    ),
    "not-judged": (
        [*good_boot(), events.NotJudged(0.3, SHELL, "uselib", "32-bit")],
        Result.NOT_JUDGED, "not judged: uselib: 32-bit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_line_names_the_fault(fault: str) -> None:
    happened, result, name = FAULTS[fault]
    summary = summarise(happened)
    assert summary.verdict.result is result
    assert summary.headline.startswith(f"{result.value}: ")
    assert name in summary.headline


def test_a_boot_as_expected() -> None:
    summary = summarise(good_boot())
    assert summary.headline == "as expected: powered off, by reboot(2) (by init, pid 1)"
    assert (summary.active_at_end, summary.denials, summary.warnings) == ("Lockdown 1.0.0", (), ())
    assert summary.executions == 22
    first, second = summary.policies
    assert (first.name, first.loaded, first.deleted, first.active) == ("AllowInitramfs", None, 0.125, ((0.0, 0.12),))
    assert (second.name, second.loaded, second.deleted, second.active) == ("Lockdown", 0.101, None, ((0.12, None),))
    assert [(step.what, step.by) for step in second.steps] == [("loaded", "cat (pid 17)"), ("activated", "sh (pid 12)")]


def test_what_would_die_under_the_final_policy() -> None:
    affected = {(one.file.path, one.operation): one for one in summarise(good_boot()).affected}
    assert set(affected) == {
        (b"/init", Operation.EXECUTE),
        (b"/bin/busybox", Operation.EXECUTE),
        (b"/bin/busybox", Operation.POLICY),
    }
    busybox = affected[b"/bin/busybox", Operation.EXECUTE]
    assert busybox.only_boot_verified
    assert busybox.times == 13
    assert busybox.allowed_by == "op=EXECUTE boot_verified=TRUE action=ALLOW"
    assert "it is not on a dm-verity volume" in busybox.reasons[0]


def test_what_another_rule_allowed_as_well_does_not_rest_on_the_initramfs_alone() -> None:
    both = Facts(boot_verified=True, dmverity_roothash=OTHER_VOLUME.dmverity_roothash)
    happened: list[Event] = [
        started(None),
        judged(0.1, b"/a", both, None),
        events.PolicyActivated(0.2, SHELL, BOOT, None),
        judged(0.3, b"/b", both, BOOT),
        events.PolicyActivated(0.4, SHELL, FINAL, None),
    ]
    affected = {one.file.path: one for one in summarise(happened).affected}
    assert (affected[b"/a"].only_boot_verified, affected[b"/a"].allowed_by) == (False, "no policy was active")
    assert affected[b"/b"].only_boot_verified


def test_denials_are_told_once_with_rule_facts_and_reason() -> None:
    denial = judged(0.3, b"/usr/bin/app", OTHER_VOLUME, FINAL, dev="dm-0")
    summary = summarise(
        with_denial(denial, denial, judged(0.31, b"/usr/bin/app", OTHER_VOLUME, FINAL, by=CAT, dev="dm-0"))
    )
    (only,) = summary.denials
    assert (only.times, only.first, only.programs) == (3, 0.3, ("sh", "cat"))
    assert (only.by, only.policy) == ("DEFAULT action=DENY", "Lockdown 1.0.0")
    assert f"root hash {OTHER_VOLUME.dmverity_roothash}, without a trusted signature" in only.facts[0]
    assert "its dm-verity root hash is sha256:0000" in only.reasons[0]


@pytest.mark.parametrize(
    ("happened", "warning"),
    [
        (
            [started(), events.Message(0.1, None, TAMPERED)],
            "tampered volume: device-mapper: verity: 254:0: data block 7",
        ),
        ([started(None)], "no policy is active at the end"),
        ([started(enforce=False)], "starts permissive (enforce=0)"),
        ([started(), events.EnforceChanged(0.1, SHELL, enforce=False)], "switched off (by sh, after 0.100 s)"),
        ([started(), events.EnforceChanged(0.1, SHELL, enforce=False)], "enforcement is off at the end"),
        (
            [started(enforce=False), judged(0.1, b"/x", NO_FACTS, BOOT, enforce=False)],
            "1 denial(s) were not carried out",
        ),
        ([started(cmdline="quiet audit=0")], "audit=0 on the command line"),
        (without_loading(failed(errno.ENOKEY), switch=True), "went on to its real root as if it had not"),
        (with_denial(failed(errno.ENOKEY, when=0.16)), "nobody made it good, and 7 execution(s) followed"),
        (without_loading(failed(errno.EBADMSG, size=8192, head=TEXT[:16])), "policy written in pieces of 8192 bytes"),
        (
            without_loading(
                failed(errno.EINVAL, size=35, head=TEXT[:16]), failed(errno.EINVAL, size=20, head=b"DEFAULT")
            ),
            "policy written in pieces: 2 writes",
        ),
        (
            [
                started(),
                events.PolicyLoaded(0.1, CAT, FINAL, FINAL_TEXT.replace(b"\n", b"\r\n"), signed=True, updated=False),
            ],
            "lines that end in CRLF: openssl without -binary",
        ),
        (
            [
                started(),
                events.PolicyLoaded(0.1, CAT, FINAL, FINAL_TEXT, signed=True, updated=False),
                events.PolicyLoaded(0.2, CAT, FINAL, FINAL_TEXT, signed=False, updated=True),
            ],
            "an unsigned policy replaced a signed one",
        ),
        ([started(), events.ImageUnpacked(0.0, None, 1, 1, left_out=("x is not unpacked",))], "x is not unpacked"),
        ([started(), events.ImageUnpacked(0.0, None, 1, 1, cut="lib/x.so")], "the image ends within lib/x.so"),
        ([started(), events.ImageUnpacked(0.0, None, 1, 1, fault="no cpio magic")], "stops unpacking the image"),
    ],
)
def test_warnings(happened: Sequence[Event], warning: str) -> None:
    assert any(warning in line for line in summarise(happened).warnings), summarise(happened).warnings


@pytest.mark.parametrize(
    "happened",
    [
        with_denial(failed(errno.ENOKEY, when=0.09)),
        with_denial(
            failed(errno.ENOKEY, when=0.16),
            events.PolicyLoaded(0.17, CAT, FINAL, FINAL_TEXT, signed=True, updated=True),
        ),
        with_denial(failed(errno.ENOKEY, when=0.39)),  # the machine ended for it
    ],
)
def test_a_write_that_is_made_good_is_no_warning(happened: Sequence[Event]) -> None:
    assert not summarise(happened).warnings


def test_an_update_of_the_active_policy_is_in_force_at_once() -> None:
    happened: list[Event] = [
        started(BOOT),
        events.PolicyLoaded(0.1, CAT, FINAL, FINAL_TEXT, signed=True, updated=True, active=True),
        judged(0.2, b"/x", NO_FACTS, FINAL),
    ]
    assert summarise(happened).denials[0].policy == "Lockdown 1.0.0"


def test_nothing_at_all() -> None:
    summary = summarise([])
    assert summary.headline == "something could not be judged: nobody saw the end of the machine"


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (b"\x30\x05", 7),
        (b"\x30\x81\x80", 131),
        (b"\x30\x82\x01\x00", 260),
        (b"\x30\x80", None),
        (b"\x30\x85\x01\x00\x00\x00\x00", None),
        (b"\x30", None),
        (b"text", None),
    ],
)
def test_the_size_a_message_declares(head: bytes, size: int | None) -> None:
    assert declared_size(head) == size


def test_subjects_with_odd_names() -> None:
    happened: list[Event] = [
        started(),
        events.PolicyLoaded(0.1, Subject(5, b"\x1b[2J"), FINAL, b"", signed=True, updated=False),
    ]
    assert summarise(happened).policies[1].steps[0].by == "\\x1b[2J (pid 5)"
