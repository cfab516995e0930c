"""Boot the same images on real kernels and on the emulator, and compare every audit record.

usage: python -m scripts.conformance_boot [--kernel 6.12 | 7.3 | debian] [WORD]

The kernels are User-Mode Linux (scripts/reference_kernel.py), built first where they are missing, and Debian's own in
QEMU (scripts/stock_kernel.py), which is fetched; the images are those of tests/conformance/boots.py and flows.py whose
names hold WORD.
"""

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from scripts import reference_kernel, stock_kernel
from scripts.reference_kernel import NotReachableError, say
from tests.conformance.booting import DebianS, InUserMode, Kernel, compare
from tests.conformance.boots import BOOTS
from tests.conformance.flows import FLOWS

_DEBIAN = "debian"


def main(arguments: list[str]) -> int:
    """Run; 1 with differences, else 0, or 77 where one of the kernels cannot be had."""
    parser = argparse.ArgumentParser(description="Compare boots with those of real kernels.")
    choices = (*reference_kernel.SERIES, _DEBIAN)
    parser.add_argument("--kernel", choices=choices, action="append", help="only this one (repeatable)")
    parser.add_argument("word", nargs="?", default="", help="only images whose names hold this")
    options = parser.parse_args(arguments)
    asked = options.kernel or choices
    boots = [boot for boot in (*BOOTS, *FLOWS) if options.word in boot.name]
    different = records = booted = 0
    with (
        tempfile.TemporaryDirectory(prefix="ipe-firmware.") as directory,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        kernels = list(_kernels(asked, Path(directory, "variables")))
        for kernel in kernels:
            for boot, compared in zip(boots, pool.map(partial(compare, kernel), boots), strict=True):
                if compared is None:
                    print(f"{kernel.name}: {boot.name}: not for this kernel", flush=True)
                    continue
                theirs, ours = compared
                records += len(theirs.records)
                booted += 1
                same = theirs == ours
                different += not same
                said = "the same" if same else "DIFFERENT"
                print(f"{kernel.name}: {boot.name}: {len(theirs.records)} records, {said}", flush=True)
                for line in difflib.unified_diff(theirs.all, ours.all, "kernel", "emulator", lineterm="", n=1):
                    print(line, flush=True)
    print(f"{booted} boots and {records} records compared; {different} boot(s) differ")
    if different:
        return 1
    return 0 if len(kernels) == len(asked) else 77


def _kernels(asked: Sequence[str], variables: Path) -> Iterator[Kernel]:
    """Get the kernels; one that cannot be had is told of and left out."""
    if series := [name for name in asked if name != _DEBIAN]:
        reference_kernel.main(series)
        for name in series:
            if kernel := reference_kernel.built(name):
                yield InUserMode(kernel.profile, kernel.program)
    if _DEBIAN in asked:
        try:
            stock = stock_kernel.ready(variables)
        except NotReachableError as error:
            say(f"Debian's kernel cannot be had here: {error}")
            return
        yield DebianS(f"linux-{stock_kernel.SERIES}", stock.kernel, stock.modules, variables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
