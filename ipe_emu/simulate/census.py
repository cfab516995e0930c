"""Which files of a tree IPE is asked about, whatever the policy."""

from collections.abc import Iterator

from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.rule import Action, Policy, Version
from ipe_emu.simulate.judge import Judge, Judgement
from ipe_emu.simulate.known import Known
from ipe_emu.simulate.tree import Found, Unreadable

#: It allows everything, so that whatever is asked about one file after another is asked.
_ALLOW_ALL = Policy("Census", Version(0, 0, 0), (), {}, Action.ALLOW)


def census(known: Known) -> Iterator[tuple[Found | Unreadable, Judgement | None]]:
    """Yield every file of a tree with what would be asked about it; None for a file that nobody asks about.

    What `Tree.walk` says of descriptors holds here.
    """
    judge = Judge(RuleIndex(_ALLOW_ALL), known)
    for found in known.tree.walk():
        yield found, judge.judge(found)
