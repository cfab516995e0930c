"""Record anew what the reference kernels answer, for tests/vectors.

usage: python -m scripts.vectors

The sequences of tests/vectors/sequences.jsonl are recorded. The older recordings, from virtual machines, are put to the
kernels again; a difference from them is reported, and they stay as they are. The sequences' printed scripts are run
too: they must give the same results.
"""

import datetime
import sys

from scripts import reference_kernel
from tests.conformance import recording
from tests.conformance.machines import UserModeLinux
from tests.vectors import HERE


def main() -> int:
    """Record; 1 where a kernel answers otherwise than what is recorded of it, or cannot be had."""
    status = reference_kernel.main([])
    for series in reference_kernel.SERIES:
        kernel = reference_kernel.built(series)
        if kernel is None:
            continue
        machine = UserModeLinux(kernel.program, f"Linux {kernel.package_version}")
        provenance = {
            "kernel": f"User-Mode Linux, Debian's linux-source-{series} {kernel.package_version}",
            "configuration": reference_kernel.configuration_digest(series),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        lines = recording.record(machine, provenance)
        recording.write(HERE / kernel.profile / "sequences.jsonl.xz", lines)
        print(f"{kernel.profile}: {len(lines) - 1} sequences recorded", flush=True)
        for way in recording.ways():
            differences = recording.typed(machine, kernel.profile, way)
            print(f"{kernel.profile}: printed scripts of {way}: {len(differences)} unlike the recording", flush=True)
            status |= bool(differences)
        for name in recording.REPLAYED:
            count, differences = recording.replay(machine, kernel.profile, name)
            print(f"{kernel.profile}: {name}: {count} steps, {len(differences)} unlike the recording", flush=True)
            for difference in differences[:10]:
                print(f"  {difference[:1000]}")
            status |= bool(differences)
    return status


if __name__ == "__main__":
    sys.exit(main())
