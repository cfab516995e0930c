"""The timeline of a machine that does things without end."""

import errno

from ipe_emu.event import File, Hook, Subject
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation
from ipe_emu.rehearse.events import Event, Failed, Judged, Message, NotJudged, Rebooted, Timeline
from ipe_emu.rehearse.verdict import Result, verdict

BY = Subject(7, b"sh")


def judged(path: bytes, number: int = 0) -> Judged:
    return Judged(0.5, BY, Operation.EXECUTE, Hook.BPRM_CHECK, File(path, "rootfs", 1), Decision(number, None))


def test_what_repeats_is_kept_for_a_while_and_what_is_new_for_longer() -> None:
    timeline = Timeline(most_of_all=10)
    told: list[Event] = []
    timeline.subscribe(told.append)
    for _ in range(50):
        timeline.add(judged(b"/bin/true"))
        timeline.add(Message(1.0, None, "the same"))
    assert len(timeline.events) == 10
    timeline.add(judged(b"/bin/true", errno.EACCES))
    timeline.add(judged(b"/bin/other"))
    timeline.add(NotJudged(2.0, BY, "mount", "why"))
    timeline.add(Rebooted(3.0, BY, "powered off", "reboot(2)"))
    assert len(timeline.events) == 14
    assert tuple(told) == timeline.events
    assert verdict(timeline.events).result is Result.NOT_JUDGED


def test_more_than_can_be_remembered_is_no_success() -> None:
    timeline = Timeline(most_of_all=10)
    for number in range(1000):
        timeline.add(judged(b"/tmp/%d" % number))
    timeline.add(Rebooted(3.0, BY, "powered off", "reboot(2)"))
    assert len(timeline.events) == 22
    assert isinstance(timeline.events[-2], Failed)
    assert isinstance(timeline.events[-1], Rebooted)
    assert verdict(timeline.events).result is Result.NOT_JUDGED
