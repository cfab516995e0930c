"""Boots as people make them, with the mistakes that people make: the report's first line says what is the matter."""

import shutil
from collections.abc import Callable

import pytest

from tests.conformance.boots import Boot, Built
from tests.conformance.flows import FLOWS, UNSIGNED_FLOW
from tests.exec_hook.running import Runner
from tests.rehearse.images import BOOT_POLICY, boot
from tests.vectors import BOOT_POLICY as RECORDED_POLICY
from tests.vectors import KEYS

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

#: Makes an image once, however many boot it.
Build = Callable[[Boot], Built]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, Built] = {}

    def of(image: Boot) -> Built:
        if image.name not in made:
            made[image.name] = image.build(tmp_path_factory.mktemp("image"))
        return made[image.name]

    return of


def first_line(emu: Runner, built: Built, policy: str, *options: str) -> tuple[str, list[str]]:
    """Boot it; return the report's first line, and what else was printed."""
    # Copies, which whoever boots can read.
    image, *disks = (shutil.copyfile(path, emu.place / path.name) for path in (built.image, *built.disks))
    options += tuple(f"--disk=vd{letter}={disk},ro" for letter, disk in zip("ab", disks, strict=False))
    done = boot(emu, image, *options, policy=policy, cmdline=built.cmdline)
    (line,) = [line for line in done.errors.splitlines() if "result: " in line]
    return line.partition("result: ")[2], done.output


@pytest.mark.parametrize("image", FLOWS, ids=lambda image: image.name.replace(" ", "-"))
def test_on_a_released_kernel(emu: Runner, build: Build, image: Boot) -> None:
    shutil.copy(KEYS / "builtin-trusted.pem", emu.place / "keys.pem")
    options = ("--kernel", "linux-7.3", "--builtin-keys", str(emu.place / "keys.pem"))
    line, output = first_line(emu, build(image), RECORDED_POLICY.read_text(), *options)
    assert line.startswith(image.headline), output


def test_an_unsigned_policy_by_the_proposal(emu: Runner, build: Build) -> None:
    line, output = first_line(emu, build(UNSIGNED_FLOW), BOOT_POLICY)
    assert line.startswith("as expected: powered off"), output
    assert [line for line in output if line.startswith("OUT")] == [
        "OUT computed", "OUT loaded", "OUT active", "OUT in the new root 0",
    ]  # fmt: skip
