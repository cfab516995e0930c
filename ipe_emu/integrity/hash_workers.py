"""Hash the blocks of a large file on every core, in order, with bounded memory.

hashlib releases the interpreter's lock, but for 4 KiB only: threads spend on handing it over what they win (measured:
no gain at all on two cores). So the work goes to worker processes, which share the open file and nothing else.
"""

import errno
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import IO

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.integrity import block_hashes
from ipe_emu.integrity.block_hashes import ANSWER, TASK, BlockHasher

#: Bytes of data hashed between two reports of progress, and in one task of a worker.
TASK_BYTES = 4 << 20
#: Below this the workers' start costs more than they win.
_WORTH_WORKERS = 32 << 20
#: A hole is worth a task of its own from this size on; smaller ones are read as the zeros they are.
_HOLE_BYTES = 1 << 20
_QUEUED = 2  # tasks per worker: while an answer is collected, the next is being worked on
_FINISHED_AHEAD = 16  # answers that may wait for an earlier one

#: Called with the number of bytes that were just dealt with.
Progress = Callable[[int], object]


@frozen
class Slots:
    """Digests of consecutive blocks: ``slots`` as many times as ``repeat`` says."""

    slots: bytes
    repeat: int = 1


@frozen
class _Task:
    offset: int
    count: int
    hole: bool = False


def no_progress(_: int) -> None:
    """Report to nobody."""


def hash_file(
    fd: int, hasher: BlockHasher, count: int, *, offset: int = 0, jobs: int = 1, progress: Progress = no_progress
) -> Generator[Slots, None, None]:
    """Yield the digests of ``count`` blocks of an open file, from byte ``offset`` on, in order.

    Holes of a sparse file are not read. ``jobs`` is the number of processes to use where the file is worth it. Raises
    OSError as pread(2), and KernelError EIO if the file ends before: it was cut while it was read.
    """
    tasks = _tasks(fd, hasher.block_size, offset, count)
    team = _team_for(fd, hasher, count, jobs)
    answers = _one_by_one(fd, hasher, tasks) if team is None else _in_order(team, hasher, tasks)
    with closing(answers):
        for task, slots in answers:
            yield slots
            progress(task.count * hasher.block_size)


def _team_for(fd: int, hasher: BlockHasher, count: int, jobs: int) -> "_Team | None":
    """Start workers, if the file is worth it and this machine lets us."""
    # A worker cannot inherit what stands in the place of its own stdin, stdout or stderr.
    if jobs < 2 or count * hasher.block_size < _WORTH_WORKERS or fd <= 2 or not sys.executable:
        return None
    try:
        return _Team(fd, hasher, jobs)
    except OSError:  # no more processes, or descriptors: slower, and the same
        return None


def _tasks(fd: int, block_size: int, start: int, count: int) -> Iterator[_Task]:
    per_task = max(1, TASK_BYTES // block_size)
    for offset, length, hole in _extents(fd, block_size, start, start + count * block_size):
        blocks = length // block_size
        if hole:
            yield _Task(offset, blocks, hole=True)
            continue
        for first in range(0, blocks, per_task):
            yield _Task(offset + first * block_size, min(per_task, blocks - first))


def _extents(fd: int, block_size: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a range of a file into data and holes, each a whole number of blocks; moves the file's offset."""
    data_from = position = start
    while position < end:
        hole, data = _next_hole(fd, position, end)
        first = hole + (start - hole) % block_size
        blocks = (data - first) // block_size if data < end else (end - first) // block_size
        if blocks * block_size >= _HOLE_BYTES:
            if first > data_from:
                yield data_from, first - data_from, False
            yield first, blocks * block_size, True
            data_from = first + blocks * block_size
        position = max(data, hole)
    if end > data_from:
        yield data_from, end - data_from, False


def _next_hole(fd: int, position: int, end: int) -> tuple[int, int]:
    """Return where the next hole begins and ends, both ``end`` if there is none, or none that the kernel tells of."""
    try:
        hole = os.lseek(fd, position, os.SEEK_HOLE)
        if hole >= min(end, os.lseek(fd, 0, os.SEEK_END)):  # the end of a file counts as a hole
            return end, end
        try:
            return hole, min(end, os.lseek(fd, hole, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return hole, min(end, os.lseek(fd, 0, os.SEEK_END))
    except OSError:  # a block device has no holes, and says EINVAL
        return end, end


def _hole(hasher: BlockHasher, task: _Task) -> Slots:
    return Slots(hasher.hash_block(bytes(hasher.block_size)), task.count)


def _one_by_one(fd: int, hasher: BlockHasher, tasks: Iterator[_Task]) -> Generator[tuple[_Task, Slots], None, None]:
    for task in tasks:
        yield task, _here(fd, hasher, task)


def _here(fd: int, hasher: BlockHasher, task: _Task) -> Slots:
    if task.hole:
        return _hole(hasher, task)
    try:
        return Slots(hasher.hash_blocks(fd, task.offset, task.count))
    except EOFError:
        raise _cut() from None


def _cut() -> KernelError:
    return KernelError(errno.EIO, "it became shorter while it was read", "pread")


class _Worker:
    """One process, and the tasks it has not answered, oldest first."""

    def __init__(self, fd: int, hasher: BlockHasher) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", block_hashes.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            bufsize=0,
        )
        self._fd = fd
        self._hasher = hasher
        self.queued: list[tuple[int, _Task]] = []

    def start(self) -> None:
        self._send(_first_line(self._fd, self._hasher))

    @property
    def answers(self) -> IO[bytes]:
        assert self._process.stdout is not None  # noqa: S101 - made with a pipe
        return self._process.stdout

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - made with a pipe
        try:
            self._process.stdin.write(data)
        except BrokenPipeError:
            raise self._died() from None

    def give(self, number: int, task: _Task) -> None:
        self.queued.append((number, task))
        self._send(TASK.pack(task.offset, task.count))

    def answer(self) -> tuple[int, _Task, Slots]:
        """Wait for the answer to the oldest task."""
        if not self.queued:  # nothing was asked: what can be read is the end
            raise self._died()
        number, task = self.queued.pop(0)
        (fault,) = ANSWER.unpack(self._receive(ANSWER.size))
        if fault == -1:
            raise _cut()
        if fault:
            raise OSError(fault, os.strerror(fault))
        return number, task, Slots(self._receive(task.count * self._hasher.slot_size))

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.answers.read(size - len(data))
            if not more:
                raise self._died()
            data += more
        return bytes(data)

    def _died(self) -> KernelError:
        return KernelError(errno.EIO, f"a process that computes hashes ended with status {self._process.wait()}", "")

    def stop(self) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)  # closes the pipes and waits


def _first_line(fd: int, hasher: BlockHasher) -> bytes:
    import json  # noqa: PLC0415 - for files that are worth workers

    return json.dumps([fd, *hasher.parameters]).encode() + b"\n"


class _Team:
    """Some workers on one file."""

    def __init__(self, fd: int, hasher: BlockHasher, jobs: int) -> None:
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        try:
            for _ in range(jobs):
                worker = _Worker(fd, hasher)
                self._workers.append(worker)
                worker.start()
                self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        return any(worker.queued for worker in self._workers)

    @property
    def has_room(self) -> bool:
        return any(len(worker.queued) < _QUEUED for worker in self._workers)

    def give(self, number: int, task: _Task) -> None:
        min(self._workers, key=lambda worker: len(worker.queued)).give(number, task)

    def collect(self) -> Iterator[tuple[int, _Task, Slots]]:
        """Wait until some answer is there, and yield all that are."""
        for key, _ in self._selector.select():
            yield key.data.answer()

    def close(self) -> None:
        self._selector.close()
        for worker in self._workers:
            worker.stop()


def _in_order(team: _Team, hasher: BlockHasher, tasks: Iterator[_Task]) -> Generator[tuple[_Task, Slots], None, None]:
    """Give tasks to whichever worker is free, and the answers out in the tasks' order."""
    finished: dict[int, tuple[_Task, Slots]] = {}
    next_out = 0
    numbered = enumerate(tasks)
    with closing(team):
        item = next(numbered, None)
        while item is not None or team.busy:
            while item is not None and len(finished) < _FINISHED_AHEAD and team.has_room:
                number, task = item
                if task.hole:
                    finished[number] = (task, _hole(hasher, task))
                else:
                    team.give(number, task)
                item = next(numbered, None)
            while next_out in finished:
                yield finished.pop(next_out)
                next_out += 1
            if team.busy:
                for number, task, slots in team.collect():
                    finished[number] = (task, slots)
        while next_out in finished:
            yield finished.pop(next_out)
            next_out += 1
