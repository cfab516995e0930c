import os
import signal
import threading
from pathlib import Path

import pytest

from ipe_emu.linux import capabilities, process
from ipe_emu.linux.process import SignalDescriptor, SignalInfo


def test_the_effective_set_is_what_proc_says() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    (shown,) = [int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")]
    assert capabilities.effective() == shown
    for capability in capabilities.Capability:
        assert capabilities.has(capability) == bool(shown >> capability & 1)


def test_signals_arrive_by_reading_with_their_origin() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    descriptor = SignalDescriptor({signal.SIGUSR1})
    try:
        assert descriptor.pending() == []
        # To this thread: another one, left by some library, would not have it blocked and die of it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert descriptor.pending() == [SignalInfo(signal.SIGUSR1, from_kernel=False)]
        assert descriptor.pending() == []
    finally:
        descriptor.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_through_a_pidfd_ends_a_process_and_is_harmless_after() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    pidfd = os.pidfd_open(child)
    process.send_signal(pidfd, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    process.send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def test_who_dies_with_its_parent_does() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            process.die_with_parent()
            os.write(writer, b"ready")
            signal.pause()
            os._exit(0)
        os.read(reader, 5)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(writer)
    assert os.read(reader, 16) == b""  # its end of the pipe is closed: it is gone
    os.close(reader)


@pytest.mark.parametrize("name", [b"short", b"longer than fifteen bytes"])
def test_a_name_is_what_others_see(name: bytes) -> None:
    before = Path("/proc/self/comm").read_bytes().strip()
    try:
        process.set_name(name)
        assert Path("/proc/self/comm").read_bytes().strip() == name[:15]
    finally:
        process.set_name(before)


def test_descriptors_are_closed_from_one_up() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 3)
        process.close_from(4)
        os.write(3, str(sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())).encode())
        os._exit(0)
    os.waitpid(child, 0)
    # What the listing itself has open is in it, under the lowest free number.
    assert os.read(reader, 100) == b"[0, 1, 2, 3, 4]"
    os.close(reader)
    os.close(writer)
