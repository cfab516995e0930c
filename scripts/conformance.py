"""Put generated sequences to real kernels and to the emulator, and compare every answer and every audit record.

usage: python -m scripts.conformance [--seed N] [--sequences N] [--steps N] [--kernel SERIES] [--way WAY]
       python -m scripts.conformance --script FILE [--way WAY] [--kernel SERIES]

The kernels are User-Mode Linux (scripts/reference_kernel.py), built first where they are missing. A difference is
shrunk and printed as a script. The same seed gives the same sequences; --batch repeats one batch of a run.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from attrs import frozen

from scripts import reference_kernel
from tests.conformance import known
from tests.conformance.compare import Count, Difference, compare
from tests.conformance.generate import JUDGED, WAYS, Generator, Step, enforcing
from tests.conformance.machines import MachineError, MountedEmulator, RunningEmulator, Trusts, UserModeLinux, medium_of
from tests.conformance.script import script
from tests.conformance.shrink import shrink
from tests.conformance.stock import StockKernel
from tests.conformance.tally import table

PER_BATCH = 40


@frozen
class Batch:
    """Some sequences for one kernel and one way into the emulator; ``number`` and the seed say which."""

    seed: int
    number: int
    kernel: UserModeLinux | StockKernel
    profile: str
    way: str
    sequences: int
    steps: int
    trusts: Trusts = "builtin"

    @property
    def emulator(self) -> MountedEmulator:
        """The emulator that is asked."""
        if self.way in JUDGED:
            return RunningEmulator(self.profile, medium=medium_of(self.way), trusts=self.trusts)
        return MountedEmulator(self.profile, trusts=self.trusts)

    @property
    def known(self) -> tuple[known.Explanation, ...]:
        """What is in the README's table."""
        of_profile = known.OP_POLICY if self.profile == "op-policy" else ()
        of_firmware = known.SECURE_BOOT if self.trusts == "platform" else ()
        return of_profile + of_firmware + (known.RUN if self.way in JUDGED else known.MOUNT)

    def describe(self) -> str:
        """What it compared, and how to repeat it."""
        return f"{self.kernel.name} and {self.emulator.name} (--seed {self.seed} --batch {self.number})"

    def compare(self, sequences: list[list[Step]]) -> tuple[Count, list[Difference]]:
        """Put sequences to both machines."""
        return compare(self.kernel, self.emulator, sequences, self.known, enforce=enforcing(self.way))

    def run(self) -> tuple[Count, list[Difference]]:
        """Generate the sequences, and put them to both machines."""
        generator = Generator(self.seed * 1_000_003 + self.number, admitting=self.profile != "op-policy")
        return self.compare([generator.sequence(self.steps, way=self.way) for _ in range(self.sequences)])

    def shrunk(self, difference: Difference) -> Difference | None:
        """The smallest sequence that shows a difference; None where the sequence alone shows none."""

        def differing(candidates: list[list[Step]]) -> list[bool]:
            _, found = self.compare(candidates)
            return [any(other.sequence is candidate for other in found) for candidate in candidates]

        _, found = self.compare([difference.sequence[: difference.step]])
        if not found:
            return None
        smallest = shrink(difference.sequence[: difference.step], differing)
        return self.compare([smallest])[1][0]


def batches(options: argparse.Namespace, kernels: list[reference_kernel.Kernel]) -> Iterator[Batch]:
    """The batches of a run: kernels and ways take turns."""
    ways = [options.way] if options.way else list(WAYS)
    left = options.sequences
    number = 0
    while left > 0:
        kernel = kernels[number % len(kernels)]
        way = ways[number // len(kernels) % len(ways)]
        size = min(PER_BATCH, left)
        machine = UserModeLinux(kernel.program, f"Linux {kernel.package_version}", medium=medium_of(way))
        yield Batch(
            options.seed,
            number,
            machine,
            "op-policy" if options.op_policy else kernel.profile,
            way,
            size,
            options.steps,
        )
        left -= size
        number += 1


def show(batch: Batch, difference: Difference, *, shrinking: bool) -> None:
    """Print a difference, shrunk if it shall and can be."""
    print(f"\nDIFFERENCE: {batch.describe()}")
    shrunk = batch.shrunk(difference) if shrinking else difference
    if shrunk is None:
        print("it needs the sequences before it: alone, the sequence shows none")
        shrunk = difference
    print(shrunk.describe())
    written = script(shrunk.sequence, shrunk.base, enforce=enforcing(batch.way))
    print("as a script:\n" + "\n".join(f"    {line}" for line in written.splitlines()), flush=True)


def add_options(parser: argparse.ArgumentParser, sequences: int) -> None:
    """Add what every run is told; ``sequences`` is how many it has unless told otherwise."""
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="repeat a run")
    parser.add_argument("--sequences", type=int, default=sequences, help="how many in all (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each (default: 50)")
    parser.add_argument("--way", choices=WAYS, help="only this way into the emulator")
    parser.add_argument("--batch", type=int, help="only this batch of the run")
    parser.add_argument("--most", type=int, default=10, help="differences to print (default: 10)")
    parser.add_argument("--as-found", action="store_true", help="print them as they are: shrinking takes many boots")


def run(wanted: list[Batch], options: argparse.Namespace, names: str) -> int:
    """Run batches, and print what was compared with the kernels, called ``names``, and what differs. See `main`."""
    print(f"seed {options.seed}: {options.sequences} sequences of {options.steps} steps", flush=True)
    total, shown, found, broken = Count(), 0, 0, 0
    start = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running: dict[Future[tuple[Count, list[Difference]]], Batch] = {
            pool.submit(batch.run): batch for batch in wanted
        }
        for future in as_completed(running):
            batch = running[future]
            try:
                count, differences = future.result()
            except MachineError as error:
                broken += 1
                print(f"\nBROKEN: {batch.describe()}: {error}")
                continue
            total += count
            found += len(differences)
            minutes = (time.monotonic() - start) / 60
            print(
                f"{minutes:5.1f} min: {total.sequences} sequences, {total.steps} steps, {total.records} records,"
                f" {found} differences", flush=True,
            )  # fmt: skip
            for difference in differences[: max(options.most - shown, 0)]:
                show(batch, difference, shrinking=not options.as_found)
                shown += 1
    print(f"what was done, and how often:\n{table(total.kinds)}")
    print(
        f"{total.sequences} sequences, {total.steps} steps and {total.records} audit records compared with"
        f" {names}: {found} differences"
    )
    return 1 if found or broken else 0


def type_in(text: str, batches_to_ask: list[Batch]) -> int:
    """Put a printed script to the machines of some batches, and print what they answer; 1 where they differ."""
    status = 0
    for batch in batches_to_ask:
        kernel, emulator = batch.kernel.type_in(text), batch.emulator.type_in(text)
        print(f"{batch.kernel.name} and {batch.emulator.name}:")
        for number, (theirs, mine) in enumerate(zip(kernel, emulator, strict=True)):
            print(f"  {number}: {theirs}" if theirs == mine else f"  {number}: kernel {theirs}\n     emulator {mine}")
        status |= kernel != emulator
    return status


def main(arguments: list[str]) -> int:
    """Run; 0 without differences, 1 with some, 77 where no reference kernel can be had."""
    parser = argparse.ArgumentParser(description="Compare the emulator with real kernels.")
    add_options(parser, sequences=2000)
    parser.add_argument("--kernel", choices=reference_kernel.SERIES, help="only this one")
    parser.add_argument(
        "--op-policy",
        action="store_true",
        help="compare the profile op-policy with Linux 7.3, from which it must differ in its answer to text alone",
    )
    parser.add_argument("--script", type=Path, help="put a printed script to both instead, made for --way")
    options = parser.parse_args(arguments)
    if os.geteuid():
        print("conformance: needs root: steps are done by several users, on mounts of its own", file=sys.stderr)
        return 77
    if options.op_policy:
        options.kernel = "7.3"
    series = [options.kernel] if options.kernel else list(reference_kernel.SERIES)
    reference_kernel.main(series)
    kernels = [kernel for name in series if (kernel := reference_kernel.built(name))]
    if not kernels:
        return 77
    wanted = [batch for batch in batches(options, kernels) if options.batch in (None, batch.number)]
    if options.script:
        return type_in(options.script.read_text(), wanted[: len(kernels)])
    return run(wanted, options, " and ".join(f"Linux {kernel.package_version}" for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
