"""What once differed from a kernel: the emulator answers the recorded sequences as each kernel did."""

import pytest

from tests.conformance import known, recording
from tests.conformance.compare import first_difference
from tests.conformance.generate import FIRST, Generator, concrete, reset
from tests.conformance.machines import RunningEmulator
from tests.conformance.script import script
from tests.vectors import KERNELS


@pytest.mark.needs("fuse", "root", "user-namespaces", "busybox")
@pytest.mark.parametrize("way", recording.ways())
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_emulator_answers_as_recorded(kernel: str, way: str) -> None:
    sequences = recording.sequences_of(way)
    recorded = recording.recorded(kernel, way)
    assert len(recorded) == len(sequences), "sequences without answers: make vectors"
    for sequence, got, wanted in zip(sequences, recording.emulated(kernel, way), recorded, strict=True):
        difference = first_difference(sequence["steps"], got, wanted, known.RUN if way == "run" else known.MOUNT)
        assert difference is None, f"{sequence['why']}: {difference}"


@pytest.mark.needs("fuse", "root", "user-namespaces", "busybox")
@pytest.mark.parametrize("way", recording.ways())
def test_a_printed_script_does_what_was_recorded(way: str) -> None:
    """What is printed of a difference can be typed in, and gives the kernel's results."""
    assert not recording.typed(recording.emulator("linux-7.3", way), "linux-7.3", way)


@pytest.mark.needs("fuse", "root", "user-namespaces", "busybox")
def test_a_printed_script_does_what_the_driver_does() -> None:
    steps = Generator(24).sequence(60, way="seals")
    assert {"seal", "execve", "shell", "mmap", "fd_write", "together"} <= {step["op"] for step in steps}
    emulator = RunningEmulator("linux-7.3", medium="seals")
    driven = emulator.answer([[reset(FIRST), *(concrete(step, FIRST) for step in steps)]])[0]
    assert emulator.type_in(script(steps, FIRST)) == [answer["result"] for answer in driven]
