"""Boot the same images on real kernels and on the emulator, and compare every audit record.

usage: python -m scripts.boot_conformance [--kernel SERIES] [--program LINUX] [WORD]

The kernels are User-Mode Linux (scripts/reference_kernel.py), built first where they are missing; the images are those
of tests/conformance/boots.py whose names hold WORD.
"""

import argparse
import difflib
import sys
from pathlib import Path

from scripts import reference_kernel
from tests.conformance.boots import BOOTS, compare


def main(arguments: list[str]) -> int:
    """Run; 0 without differences, 1 with some, 77 where no reference kernel can be had."""
    parser = argparse.ArgumentParser(description="Compare boots with those of real kernels.")
    parser.add_argument("--kernel", choices=reference_kernel.SERIES, help="only this one")
    parser.add_argument("--program", type=Path, help="a kernel that is built already, of the series --kernel")
    parser.add_argument("word", nargs="?", default="", help="only images whose names hold this")
    options = parser.parse_args(arguments)
    series = [options.kernel] if options.kernel else list(reference_kernel.SERIES)
    if options.program is not None:
        kernels = [reference_kernel.Kernel(series[0], options.program)]
    else:
        reference_kernel.main(series)
        kernels = [kernel for name in series if (kernel := reference_kernel.built(name))]
    if not kernels:
        return 77
    different = records = 0
    for kernel in kernels:
        for boot in BOOTS:
            if options.word not in boot.name:
                continue
            theirs, ours = compare(kernel.program, kernel.profile, boot)
            records += len(theirs.records)
            same = theirs == ours
            different += not same
            print(
                f"{kernel.profile}: {boot.name}: {len(theirs.records)} records, {'the same' if same else 'DIFFERENT'}"
            )
            print(*difflib.unified_diff(theirs.all, ours.all, "kernel", "emulator", lineterm="", n=1), sep="\n", end="")
    print(f"{records} records compared; {different} boot(s) differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
