"""Put generated sequences to Debian's own kernel as it is shipped, and compare what it answers: a short conformance.

usage: python -m scripts.conformance_stock [--seed N] [--sequences N] [--steps N] [--way WAY] [--batch N] [--refresh]

The kernel runs in QEMU, with firmware whose db holds the tests' keys: it finds them in its platform keyring. It has no
boot policy, and security modules beside IPE; of Secure Boot it is locked down, and takes signed modules alone.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from scripts import stock_kernel
from scripts.conformance import Batch, add_options, run
from scripts.reference_kernel import NotReachableError, say
from tests.conformance.generate import WAYS
from tests.conformance.machines import medium_of
from tests.conformance.stock import StockKernel, accelerator

PER_BATCH = 10
#: Sealed files lie on ext4, which is a module that is not fetched for it.
ITS_WAYS = tuple(way for way in WAYS if way != "seals")


def main(arguments: list[str]) -> int:
    """Run; 0 without differences, 1 with some, 77 where the kernel cannot be had or run."""
    parser = argparse.ArgumentParser(description="Compare the emulator with Debian's own kernel.")
    add_options(parser, sequences=40)
    parser.add_argument("--refresh", action="store_true", help="look for a newer package")
    options = parser.parse_args(arguments)
    if options.way not in (None, *ITS_WAYS):
        parser.error(f"this kernel has no files for --way {options.way}")
    if os.geteuid():
        print("conformance-stock: needs root: steps are done by several users, on mounts of its own", file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory(prefix="ipe-firmware.") as directory:
        variables = Path(directory, "variables")
        try:
            stock = stock_kernel.ready(variables, refresh=options.refresh)
        except NotReachableError as error:
            say(f"Debian's kernel cannot be had here: {error}")
            return 77
        name = f"Debian's Linux {stock.package_version}"
        print(f"{name} in QEMU ({accelerator()})", flush=True)
        ways = [options.way] if options.way else list(ITS_WAYS)
        wanted = []
        for number, first in enumerate(range(0, options.sequences, PER_BATCH)):
            way = ways[number % len(ways)]
            machine = StockKernel(stock.kernel, stock.modules, variables, name, medium=medium_of(way))
            size = min(PER_BATCH, options.sequences - first)
            profile = f"linux-{stock_kernel.SERIES}"
            wanted.append(Batch(options.seed, number, machine, profile, way, size, options.steps, trusts="platform"))
        return run([batch for batch in wanted if options.batch in (None, batch.number)], options, name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
