"""Measure the targets, side by side in one run, and print a table; a measurement, never a test.

What can be compared is measured in turns with what it is compared to, so that a busy machine slows both. Each figure
is the median of its rounds.

With arguments only what they name is measured: decisions, parsing, verification, nodes, loops, starts, boots, trees,
simulations.
"""

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from attrs import frozen
from rich.console import Console
from rich.table import Table

from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.pkcs7 import verify_pkcs7_signature
from ipe_emu.pkcs7.keys import new_test_key
from ipe_emu.pkcs7.sign import sign_policy
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.rule import Action, Operation
from scripts import reference_kernel, stock_kernel
from tests.conformance.booting import DebianS, InUserMode, Kernel, on_the_emulator
from tests.conformance.boots import Built
from tests.conformance.flows import SIGNED_FLOW
from tests.conformance.stock import accelerator

HERE = Path(__file__).parent
VECTORS = HERE.parent / "tests" / "vectors"
EMU = Path(sys.executable).parent / "ipe-emu"
SIGNED_RULES = 600  # what fits in a signed policy
MANY_RULES = 38_000  # what fits in 4 MiB
LOOP = 500
TREE_FILES = 20_000
LARGEST_COPIED = 16 << 20  # the tree is made in a temporary directory


@frozen
class Row:
    """One line of the table."""

    what: str
    measured: str
    target: str
    met: bool


def median(rounds: int, measure: Callable[[], float]) -> float:
    """The median of some measurements, in whatever unit they have."""
    return statistics.median(measure() for _ in range(rounds))


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def policy_text(rules: int) -> bytes:
    """A policy of digest rules. With SHA-224 as many fit into the limits as the targets say."""
    lines = [b"policy_name=bench policy_version=1.0.0", b"DEFAULT action=DENY"]
    lines += [b"op=EXECUTE dmverity_roothash=sha224:%056x action=ALLOW" % number for number in range(rules)]
    return b"\n".join(lines) + b"\n"


def decisions() -> Iterator[Row]:
    """One decision, by the last rule of policies of three sizes."""
    turns = 20_000

    def decide(index: RuleIndex, facts: Facts) -> float:
        start = time.perf_counter()
        for _ in range(turns):
            evaluate(index, Operation.EXECUTE, facts)
        return (time.perf_counter() - start) / turns * 1e6

    for rules in (1, SIGNED_RULES, MANY_RULES):
        index = RuleIndex(parse_policy(policy_text(rules)))
        facts = Facts(dmverity_roothash=Digest("sha224", (rules - 1).to_bytes(28)))
        if evaluate(index, Operation.EXECUTE, facts).action is not Action.ALLOW:
            raise SystemExit("the last rule did not decide: nothing was measured")
        micros = median(9, partial(decide, index, facts))
        yield Row(f"a decision, {rules:,} rules", f"{micros:.2f} µs", "5 µs", micros <= 5)


def parsing() -> Iterator[Row]:
    """A policy of the largest size."""
    text = policy_text(MANY_RULES)
    millis = median(5, lambda: seconds(lambda: parse_policy(text)) * 1e3)
    yield Row(f"parsing {MANY_RULES:,} rules", f"{millis:.0f} ms", "200 ms", millis <= 200)


def verification(place: Path) -> Iterator[Row]:
    """A policy signed with RSA-2048, as large as it may be."""
    key, certificate = new_test_key("bench", kind="rsa2048")
    (place / "bench.pem").write_bytes(certificate)
    keyrings = Keyrings(builtin=load_certificates([place / "bench.pem"]))
    signed = sign_policy(policy_text(SIGNED_RULES), key, certificate)
    millis = median(200, lambda: seconds(lambda: verify_pkcs7_signature(signed, keyrings)) * 1e3)
    yield Row(f"verifying an RSA-2048 policy of {len(signed):,} bytes", f"{millis:.2f} ms", "0.5 ms", millis <= 0.5)


@contextmanager
def nothing_mounted(place: Path) -> Iterator[Path]:
    """A pyfuse3 file system that does nothing, to compare with."""
    target = place / "nothing"
    target.mkdir()
    server = subprocess.Popen([sys.executable, HERE / "nothing_fs.py", target], stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        if server.stdout.readline() != b"ready\n":
            raise SystemExit("the file system to compare with could not be mounted")
        yield target / "ipe" / "enforce"
    finally:
        subprocess.run(["fusermount3", "-u", target], check=False)
        server.wait(timeout=10)
        server.stdout.close()


@contextmanager
def emulator_mounted(place: Path) -> Iterator[Path]:
    """A mounted emulator, in this session as what it is compared with.

    In a session of its own, as it usually is, any server is scheduled apart from its clients where the kernel groups
    sessions (sched_autogroup in sched(7)), which took a server that does nothing four times as long on a busy machine.
    """
    target = place / "mounted"
    target.mkdir()
    server = subprocess.Popen([EMU, "mount", "--foreground", target], stderr=subprocess.PIPE)
    assert server.stderr is not None
    try:
        if not any(b"mounted on" in line for line in server.stderr):
            raise SystemExit("the emulator could not be mounted")
        yield target / "ipe" / "enforce"
    finally:
        subprocess.run([EMU, "umount", target], check=True, stderr=subprocess.DEVNULL)
        server.wait(timeout=10)
        server.stderr.close()


@contextmanager
def on_one_processor() -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on one processor.

    Else it is measured whether the kernel wakes a server on a processor that sleeps, which takes longer than the work.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def nodes(place: Path) -> Iterator[Row]:
    """Reading and writing ``enforce``, open and close included, in turns with the file system that does nothing."""

    def read(path: Path) -> None:
        for _ in range(200):
            fd = os.open(path, os.O_RDONLY)
            os.read(fd, 64)
            os.close(fd)

    def write(path: Path) -> None:
        for _ in range(200):
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, b"1")
            os.close(fd)

    with on_one_processor(), nothing_mounted(place) as nothing, emulator_mounted(place) as emulated:
        for name, action in (("reading enforce (open, read", read), ("writing enforce (open, write", write)):
            pairs = [(seconds(partial(action, emulated)), seconds(partial(action, nothing))) for _ in range(15)]
            ours, theirs = (statistics.median(side) / 200 * 1e6 for side in zip(*pairs, strict=True))
            ratio = ours / theirs
            yield Row(
                f"{name}, close), against a file system that does nothing",
                f"{ratio:.2f} ({ours:.0f} µs to {theirs:.0f} µs)",
                "1.3",
                ratio <= 1.3,
            )


def loops(place: Path) -> Iterator[Row]:
    """A shell loop that executes, bare, under ``run`` and under strace; its start is not counted, only the loop."""
    busybox = shutil.which("busybox")
    bash = shutil.which("bash")
    if busybox is None or bash is None:
        yield Row("a shell loop under run", "not measured: no busybox, or no bash", "1.6", met=False)
        return
    script = f'a=$EPOCHREALTIME; for ((i = 0; i < {LOOP}; i++)); do {busybox} true; done; echo "$a $EPOCHREALTIME"'
    policy = place / "loop.pol"
    policy.write_text(
        "policy_name=loop policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
    )
    run: list[str | Path] = [EMU, "run", "--boot-policy", policy, "--boot-verified", "/usr", "--"]
    strace: list[str | Path] = ["strace", "-f", "--seccomp-bpf", "-e", "trace=execve", "-o", "/dev/null"]

    def loop(*before: "str | Path") -> float:
        done = subprocess.run(
            [*before, bash, "-c", script], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        start, end = map(float, done.stdout.split())
        return end - start

    prefixes: list[list[str | Path]] = [[], run]
    if shutil.which("strace"):
        prefixes.append(strace)
    rounds = [[loop(*prefix) for prefix in prefixes] for _ in range(7)]
    bare, ours, *traced = (statistics.median(side) for side in zip(*rounds, strict=True))
    figures = f"{ours / bare:.2f} ({ours / LOOP * 1e6:.0f} µs to {bare / LOOP * 1e6:.0f} µs)"
    yield Row(
        f"a shell loop of {LOOP} `busybox true` under run, against the bare loop", figures, "1.6", ours / bare <= 1.6
    )
    if traced:
        ratio = ours / traced[0]
        yield Row("the same, against strace -f --seccomp-bpf", f"{ratio:.2f}", "1", ratio <= 1)
    else:
        yield Row("the same, against strace -f --seccomp-bpf", "not measured: no strace here", "1", met=False)


def starts(place: Path) -> Iterator[Row]:
    """From nothing to a result, in a process of its own."""
    policy = place / "small.pol"
    policy.write_bytes(policy_text(5))
    target = place / "start"
    target.mkdir()

    def started(*arguments: "str | Path") -> float:
        return seconds(lambda: subprocess.run([EMU, *arguments], check=True, capture_output=True)) * 1e3

    def mounted() -> float:
        millis = started("mount", target)
        subprocess.run([EMU, "umount", target], check=True, capture_output=True)
        return millis

    for what, measure, target_ms in (
        ("policy check, from a cold start", lambda: started("policy", "check", policy), 120),
        ("mount, until it is ready", mounted, 350),
        ("run -- true", lambda: started("run", "--", "true"), 350),
    ):
        millis = median(15, measure)
        yield Row(what, f"{millis:.0f} ms", f"{target_ms} ms", millis <= target_ms)


def boots(place: Path) -> Iterator[Row]:
    """Whole boots of a small initramfs, beside those of User-Mode Linux where it was built (reference_kernel.py)."""
    tree = place / "initramfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "sys").mkdir()
    shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    keys = VECTORS / "keys"
    text = b"policy_name=Smallest policy_version=1.0.0\nDEFAULT action=ALLOW\n"
    signed = sign_policy(text, (keys / "trusted.key").read_bytes(), (keys / "trusted.pem").read_bytes())
    (tree / "policy").write_bytes(signed)
    (tree / "init").write_text(
        "#!/bin/sh\n/bin/busybox mount -t sysfs sysfs /sys\n"
        "/bin/busybox mount -t securityfs securityfs /sys/kernel/security\ncd /sys/kernel/security/ipe\n"
        "/bin/busybox cat /policy > new_policy && echo 1 > policies/Smallest/active || exec /bin/busybox false\n"
        "i=0; while [ $i -lt ${turns:-0} ]; do /bin/busybox true; i=$((i+1)); done\n/bin/busybox poweroff -f\n"
    )
    (tree / "init").chmod(0o755)
    image = place / "initramfs.cpio"
    names = "".join(f"{path.relative_to(tree)}\n" for path in [tree, *sorted(tree.rglob("*"))])
    with image.open("wb") as file:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), stdout=file, check=True)
    ours: list[str | Path] = [
        EMU, "boot", "--kernel", "linux-7.3", "--boot-policy", VECTORS / "boot-policy.pol", "--builtin-keys",
        keys / "builtin-trusted.pem", "--timeout", "60",
    ]  # fmt: skip
    kernel = reference_kernel.built("7.3")
    loop = f"i=0; while [ $i -lt {LOOP} ]; do {tree}/bin/busybox true; i=$((i+1)); done"
    for what, turns, rounds, share in (
        ("booting busybox: load a policy, activate it, power off", 0, 7, 2.0),
        (f"the same with {LOOP} executions", LOOP, 3, 0.1),
    ):
        boot: list[str | Path] = [*ours, "--cmdline", f"turns={turns}", image]
        uml: list[str | Path] = [f"initrd={image}", "mem=128M", "con=null", "quiet", f"turns={turns}"]
        times: dict[str, list[float]] = {"ours": [], "uml": [], "bare": []}
        for _ in range(rounds):
            times["ours"].append(seconds(partial(quiet, *boot)))
            if kernel is not None:
                times["uml"].append(seconds(partial(quiet, kernel.program, *uml)))
            if turns:
                times["bare"].append(seconds(partial(quiet, tree / "bin/busybox", "sh", "-c", loop)))
        took = statistics.median(times["ours"])
        if kernel is None:
            yield Row(what, f"{took:.2f} s", "User-Mode Linux is not built here", True)
            continue
        theirs = statistics.median(times["uml"])
        measured = f"{took / theirs:.2f} ({took:.2f} s to {theirs:.2f} s)"
        yield Row(f"{what}, against User-Mode Linux", measured, f"{share:g}", took <= share * theirs)
        if turns:  # nothing that executes can be quicker
            floor = statistics.median(times["bare"])
            measured = f"{floor / theirs:.2f} ({floor:.2f} s to {theirs:.2f} s)"
            yield Row(f"these {LOOP} executions alone, not emulated at all", measured, "-", met=True)
        elif (debian := debian_in_qemu(place)) is not None:
            slow = seconds(lambda: debian.boot(Built(image, "", ())))
            measured = f"{took / slow:.3f} ({took:.2f} s to {slow:.1f} s)"
            yield Row(f"the same, against {in_qemu()}", measured, "-", met=True)


def roots(place: Path) -> Iterator[Row]:
    """Whole boots whose initramfs opens a verity root by veritysetup and switches into it, beside every kernel here."""
    what = "booting with veritysetup and switch_root"
    kernel = reference_kernel.built("7.3")
    machines: list[tuple[Kernel, str, int]] = []
    if kernel is not None:
        machines.append((InUserMode(kernel.profile, kernel.program), "User-Mode Linux", 5))
    if (debian := debian_in_qemu(place)) is not None:
        machines.append((debian, in_qemu(), 1))
    for number, (machine, name, rounds) in enumerate(machines):
        boot = machine.prepared(SIGNED_FLOW)
        assert boot is not None
        (place / f"root-{number}").mkdir()
        built = boot.build(place / f"root-{number}")
        pairs = [
            (seconds(partial(on_the_emulator, machine, built)), seconds(partial(machine.boot, built)))
            for _ in range(rounds)
        ]
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        measured = f"{ours / theirs:.2f} ({ours:.2f} s to {theirs:.2f} s)"
        yield Row(f"{what}, against {name}", measured, "-", met=True)
    if not machines:
        yield Row(what, "not measured: no kernel to compare with is here", "-", met=True)


def debian_in_qemu(place: Path) -> DebianS | None:
    """Debian's own kernel, where everything it needs is here already (make conformance-boot gets it)."""
    stock = stock_kernel.at_hand(place / "firmware")
    if stock is None:
        return None
    return DebianS(f"linux-{stock_kernel.SERIES}", stock.kernel, stock.modules, place / "firmware")


def in_qemu() -> str:
    """What the table calls it."""
    return f"Debian's kernel in QEMU ({accelerator()})"


def quiet(*command: "str | Path") -> None:
    """Run a command, whose output does not matter; its failure does."""
    subprocess.run(command, check=True, timeout=100, stdin=subprocess.DEVNULL, capture_output=True)


def trees(place: Path) -> Iterator[Row]:
    """Hashing an image of a gibibyte, in turns with the programs that do it in C; and the memory that takes."""
    veritysetup = shutil.which("veritysetup", path=f"{os.environ['PATH']}:/usr/sbin")
    fsverity = shutil.which("fsverity")
    if veritysetup is None or fsverity is None:
        yield Row("hashing 1 GiB", "not measured: no veritysetup, or no fsverity", "0.8", met=False)
        return
    image, hash_image = place / "image", place / "image.hash"
    part = os.urandom(64 << 20)
    with image.open("wb") as file:
        for _ in range(16):
            file.write(part)
    ours: list[str | Path] = [EMU, "verity"]
    formatted = subprocess.run(
        [*ours, "dm", "format", "--salt", "-", image, hash_image], check=True, capture_output=True, text=True
    ).stdout
    root = formatted.split()[-1]
    their_format: list[str | Path] = [veritysetup, "format", "--salt", "-", image, place / "theirs"]
    their_verify: list[str | Path] = [veritysetup, "verify", image, hash_image, root]

    def finished(*command: "str | Path") -> float:
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))

    comparisons: tuple[tuple[str, list[str | Path], list[str | Path]], ...] = (
        ("dm roothash of 1 GiB, against veritysetup verify", ["dm", "roothash", image], their_verify),
        ("dm roothash of 1 GiB, against veritysetup format", ["dm", "roothash", image], their_format),
        ("dm verify of 1 GiB, against veritysetup verify", ["dm", "verify", image, hash_image, root], their_verify),
        ("fs digest of 1 GiB, against fsverity digest", ["fs", "digest", image], [fsverity, "digest", image]),
    )
    for what, mine, theirs in comparisons:
        pairs = [(finished(*ours, *mine), finished(*theirs)) for _ in range(7)]
        mine_s, theirs_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = mine_s / theirs_s
        yield Row(what, f"{ratio:.2f} ({mine_s:.2f} s to {theirs_s:.2f} s)", "0.8", ratio <= 0.8)
    mib = memory_of(*ours, "dm", "verify", image, hash_image, root)
    yield Row("memory of dm verify of 1 GiB, all its processes", f"{mib:.0f} MiB", "200 MiB", mib <= 200)


def simulations(place: Path) -> Iterator[Row]:
    """Judging all of a root tree: once by where its files lie, and once by the fs-verity digest of each."""
    tree = root_tree(place / "root")
    policy, digests = place / "signed.pol", place / "digests.pol"
    policy.write_text(
        "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE dmverity_signature=TRUE action=ALLOW\n"
    )
    # Too large to be signed (1); a file that cannot be measured (4) is one of this machine.
    subprocess.run([EMU, "policy", "from", "-o", digests, tree], check=False, capture_output=True)
    command: list[str | Path] = [EMU, "policy", "simulate", "--policy"]
    volume: list[str | Path] = ["--roothash", f"sha256:{'00' * 32}", "--signed", tree]
    for what, arguments in (
        (f"policy simulate of {TREE_FILES:,} files", [policy, *volume]),
        ("the same, with a rule for each file's digest", [digests, "--fsverity", "sha256", tree]),
    ):
        # It ends with status 1: for what this part of a system lacks.
        simulate = partial(subprocess.run, [*command, *arguments], check=False, capture_output=True)
        took = median(5, partial(seconds, simulate))
        yield Row(what, f"{took:.2f} s", "5 s", took <= 5)
    mib = memory_of(*command, policy, *volume, statuses=(0, 1, 4))
    yield Row("memory of policy simulate", f"{mib:.0f} MiB", "200 MiB", mib <= 200)


def root_tree(root: Path) -> Path:
    """A root tree of so many files, copied from this machine's own /usr, again and again if that has fewer."""
    root.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc").mkdir()
    shutil.copy("/etc/ld.so.cache", root / "etc")
    copied = 0
    for turn in itertools.count():
        for top in ("bin", "sbin", "lib64", "lib", "share"):
            for directory, _, names in os.walk(f"/usr/{top}"):
                target = root / ("." if turn == 0 else str(turn)) / directory[1:]
                target.mkdir(parents=True, exist_ok=True)
                for name in names:
                    source = Path(directory, name)
                    with suppress(OSError):  # whatever a plain user may not read
                        if source.lstat().st_size <= LARGEST_COPIED:
                            shutil.copy2(source, target / name, follow_symlinks=False)
                            copied += not source.is_symlink()
                    if copied == TREE_FILES:
                        return root
    raise AssertionError


def memory_of(*command: "str | Path", statuses: tuple[int, ...] = (0,)) -> float:
    """The most MiB that a command and its children had at once, pages they share counted once; by looking often."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(OSError):  # whatever ends while it is looked at
                pids = [
                    process.pid,
                    *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()),
                ]
                most = max(most, sum(pss(pid) for pid in pids))
            time.sleep(0.01)
    if process.returncode not in statuses:
        raise SystemExit("what was to be measured failed")
    return most / 1024


def pss(pid: int) -> int:
    """The KiB of memory a process has, its share of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Measure everything, or what the arguments name, and print the table."""
    console = Console()
    console.width = max(console.width, 130)  # a figure is looked for in one line, in a log too
    table = Table("what", "measured (median)", "target", "", title="ipe-emu, measured in one run on this machine")
    with tempfile.TemporaryDirectory(prefix="ipe-bench.") as name, console.status("measuring…"):
        place = Path(name)
        measurements: dict[str, Callable[[], Iterator[Row]]] = {
            "decisions": decisions,
            "parsing": parsing,
            "verification": partial(verification, place),
            "nodes": partial(nodes, place),
            "loops": partial(loops, place),
            "starts": partial(starts, place),
            "boots": partial(boots, place),
            "roots": partial(roots, place),
            "trees": partial(trees, place),
            "simulations": partial(simulations, place),
        }
        if unknown := set(sys.argv[1:]) - measurements.keys():
            raise SystemExit(f"nothing is measured by the name of {sorted(unknown)[0]}: {', '.join(measurements)}")
        for what in sys.argv[1:] or measurements:
            for row in measurements[what]():
                table.add_row(row.what, row.measured, row.target, "met" if row.met else "MISSED")
    console.print(table)


if __name__ == "__main__":
    main()
