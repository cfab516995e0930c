"""What is said while a boot runs, between the lines of the machine itself: what happens to policies, and denials."""

from collections.abc import Callable
from typing import Final

from attrs import frozen

from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.words import line_of, shown

_RED: Final = "\x1b[31m"
_GREEN: Final = "\x1b[32m"
_YELLOW: Final = "\x1b[33m"
_NORMAL: Final = "\x1b[0m"
_BAD: Final = (
    events.Judged,
    events.ImageUnpacked,
    events.ControlFailed,
    events.Panicked,
    events.Failed,
    events.TimedOut,
)
#: What a kernel says by itself, word for word.
_THE_KERNELS: Final = (events.Message, events.Panicked, events.ImageUnpacked)
_DOUBTFUL: Final = (events.NotJudged, events.NotDone, events.EnforceChanged, events.Interrupted)


@frozen
class Live:
    """Says each event as it happens, one line in the form of the kernel's log."""

    say: Callable[[str], None]
    coloured: bool

    def tell(self, event: Event) -> None:
        """Say an event, if it is worth a line."""
        line = line_of(event)
        if line is None or isinstance(event, events.ShellOpened):  # which says more by itself
            return
        # Names come from the image: nothing of them may do anything to a terminal.
        text = shown(line.encode(errors="surrogateescape"))
        prefix = "" if isinstance(event, _THE_KERNELS) else "ipe-emu: "
        self.say(f"[{event.when:12.6f}] {self._colour(event)}{prefix}{text}{_NORMAL if self.coloured else ''}")

    def _colour(self, event: Event) -> str:
        if not self.coloured:
            return ""
        if isinstance(event, _BAD):
            return _RED
        if isinstance(event, _DOUBTFUL):
            return _YELLOW
        return _NORMAL if isinstance(event, events.Message) else _GREEN
