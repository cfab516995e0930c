"""A progress bar on stderr, for what takes long, where somebody looks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ipe_emu.integrity.hash_workers import Progress, no_progress

#: Bytes; less is done before a bar could be read.
_WORTH_A_BAR = 256 << 20


@contextmanager
def counting(what: str) -> Iterator[Callable[[], object]]:
    """Show how many there were so far, of a number that nobody knows, if stderr is a terminal; call it for each."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn())
    # Only what goes to the terminal as well is printed above the bar.
    redirected = sys.stdout.isatty()
    with Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=redirected) as bar:
        task = bar.add_task(what, total=None)
        yield lambda: bar.advance(task)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Progress]:
    """Show a bar for ``total`` bytes, if that is much and stderr is a terminal; gives what to tell of advances."""
    if total < _WORTH_A_BAR or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bar(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
