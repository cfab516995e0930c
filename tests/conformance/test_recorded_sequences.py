"""What once differed from a kernel: the emulator answers the recorded sequences as each kernel did."""

import pytest

from tests.conformance import known, recording
from tests.conformance.compare import first_difference
from tests.vectors import KERNELS


@pytest.mark.needs("fuse", "root", "user-namespaces", "busybox")
@pytest.mark.parametrize("way", recording.ways())
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_emulator_answers_as_recorded(kernel: str, way: str) -> None:
    sequences = [sequence for sequence in recording.sequences() if sequence["way"] == way]
    recorded = recording.recorded(kernel, way)
    assert len(recorded) == len(sequences), "sequences without answers: make vectors"
    for sequence, got, wanted in zip(sequences, recording.emulated(kernel, way), recorded, strict=True):
        difference = first_difference(sequence["steps"], got, wanted, known.RUN if way == "run" else known.MOUNT)
        assert difference is None, f"{sequence['why']}: {difference}"
