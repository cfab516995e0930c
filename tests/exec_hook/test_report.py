import errno

from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook.plan import Event
from ipe_emu.exec_hook.report import Report
from ipe_emu.lsm import Decision, UpstreamRefusal
from ipe_emu.policy.evaluate import Match, Verdict
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.rule import Action, Operation

SUBJECT = Subject(7, b"sh")
RULE = parse_policy(
    b"policy_name=a policy_version=1.0.0\nDEFAULT action=ALLOW\nop=EXECUTE boot_verified=FALSE action=DENY\n"
).rules[0]


def event(path: bytes | None, hook: Hook = Hook.BPRM_CHECK) -> Event:
    return Event(Operation.EXECUTE, hook, SUBJECT, File(path, "vda", 1) if path is not None else None)


def denial(match: Match = Match.RULE) -> Decision:
    rule = RULE if match is Match.RULE else None
    return Decision(errno.EACCES, Verdict(Action.DENY, match, Operation.EXECUTE, rule))


def test_nothing_is_said_when_all_is_well() -> None:
    report = Report()
    assert list(report.lines()) == []
    assert report.all_judged
    assert report.denied_events == 0


def test_denials_are_counted_most_frequent_first() -> None:
    report = Report()
    report.denied(event(b"/a"), denial(Match.GLOBAL_DEFAULT))
    for _ in range(3):
        report.denied(event(None, Hook.MMAP), denial(Match.OPERATION_DEFAULT))
    report.denied(event(b"/with \xff\n"), denial())
    assert list(report.lines()) == [
        "denied: 5",
        "  times  operation  hook        file                     by",
        "      3  EXECUTE    MMAP        (memory without a file)  DEFAULT op=EXECUTE action=DENY",
        "      1  EXECUTE    BPRM_CHECK  /a                       DEFAULT action=DENY",
        r"      1  EXECUTE    BPRM_CHECK  /with \udcff\n           op=EXECUTE boot_verified=FALSE action=DENY",
    ]
    assert report.all_judged


def test_what_is_remembered_is_bounded_and_still_counted() -> None:
    report = Report()
    for number in range(5000):
        report.denied(event(b"/%d" % number), denial())
    lines = list(report.lines())
    assert lines[0] == "denied: 5000"
    assert len(lines) == 23
    assert lines[-1] == "  and at least 980 more kinds"


def test_what_was_not_judged_or_failed_is_said() -> None:
    report = Report()
    report.not_judged(SUBJECT, "personality", "of no kind")
    report.not_judged(SUBJECT, "personality", "of no kind")
    report.not_judged(None, "mmap", "gone")
    assert not report.all_judged
    assert list(report.lines()) == [
        "could not be judged: 3",
        "  personality of sh (pid 7): of no kind (2 times)",
        "  mmap of ?: gone",
    ]
    failed = Report()
    failed.failed("serving: broken")
    assert not failed.all_judged
    assert list(failed.lines()) == ["failed: serving: broken"]


def test_what_was_not_done_is_said_and_no_failure() -> None:
    report = Report()
    report.not_done(SUBJECT, "finit_module", "the module would be loaded")
    assert report.all_judged
    assert list(report.lines())[1] == "  finit_module of sh (pid 7): the module would be loaded"


def test_what_a_released_kernel_refuses_is_said() -> None:
    refusals = [UpstreamRefusal("one", "on linux-7.3: EBADMSG"), UpstreamRefusal("two", "…", replaced_signed=True)]
    assert list(Report().lines(refusals)) == [
        "done here, refused by linux-7.3: 2; the first: one (on linux-7.3: EBADMSG)",
        "warning: an unsigned policy replaced a signed one",
    ]
