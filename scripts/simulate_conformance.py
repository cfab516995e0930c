"""Execute every file of a tree on real kernels, and compare what comes of it with what ``policy simulate`` says.

usage: python -m scripts.simulate_conformance [--kernel SERIES]

The kernels are User-Mode Linux (scripts/reference_kernel.py), built first where they are missing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from scripts import reference_kernel
from tests.conformance.executions import build_tree, compare
from tests.simulate.cases import DISTRUSTED


def main(arguments: list[str]) -> int:
    """Run; 0 without differences, 1 with some, 77 where no reference kernel can be had."""
    parser = argparse.ArgumentParser(description="Compare policy simulate with real kernels.")
    parser.add_argument("--kernel", choices=reference_kernel.SERIES, help="only this one")
    options = parser.parse_args(arguments)
    series = [options.kernel] if options.kernel else list(reference_kernel.SERIES)
    reference_kernel.main(series)
    kernels = [kernel for name in series if (kernel := reference_kernel.built(name))]
    if not kernels:
        return 77
    executed = different = 0
    with tempfile.TemporaryDirectory(prefix="ipe-simulate.") as name:
        place = Path(name)
        root = build_tree(place)
        for kernel in kernels:
            for case in DISTRUSTED:
                count, differences = compare(kernel.program, root, place, case)
                executed += count
                different += len(differences)
                print(f"{kernel.profile}: distrusting {case}: {count} files, {len(differences)} different", flush=True)
                print("".join(f"  {line}\n" for line in differences), end="")
    print(f"{executed} executions compared; {different} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
