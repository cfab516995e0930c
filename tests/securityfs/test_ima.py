"""The node of IMA's policy, as real programs write to it: mounted, in a run, and in a boot."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ipe_emu.errors import errno_name
from tests.exec_hook.running import Runner, runner
from tests.securityfs.emulator import Emulator

pytestmark = [pytest.mark.needs("fuse", "busybox"), pytest.mark.timeout(100)]

NODE = "/sys/kernel/security/ima/policy"
DENYING = """policy_name=P policy_version=1.0.0
DEFAULT action=ALLOW
op=POLICY boot_verified=TRUE action=ALLOW
op=POLICY action=DENY
"""


def code(action: Callable[[], object]) -> object:
    try:
        return action()
    except OSError as error:
        return errno_name(error.errno)


def test_it_is_where_the_kernel_has_it(emulator: Emulator) -> None:
    root = emulator.directory
    assert (root / "ima").readlink() == Path("integrity/ima")
    assert [node.name for node in (root / "ima").iterdir()] == ["policy"]
    assert (root / "ima/policy").stat().st_mode & 0o7777 == 0o200


@pytest.mark.needs("root")
def test_how_it_can_be_opened(emulator: Emulator) -> None:
    """Also without CAP_MAC_ADMIN, which is IPE's affair: the mode bits decide. One at a time."""
    node = emulator.directory / "ima/policy"
    assert code(lambda: os.open(node, os.O_RDONLY)) == "EACCES"
    assert code(lambda: os.open(node, os.O_RDWR)) == "EACCES"
    for _ in range(20):  # closed is closed
        os.close(os.open(node, os.O_WRONLY))
    fd = os.open(node, os.O_WRONLY)
    assert code(lambda: os.open(node, os.O_WRONLY)) == "EBUSY"
    os.close(fd)


def test_lines_and_positions(emulator: Emulator) -> None:
    fd = os.open(emulator.directory / "ima/policy", os.O_WRONLY)
    assert os.write(fd, b"# one\n# two\n") == 6
    assert os.write(fd, b"# two\n") == 6  # the kernel's position stays where it was
    assert code(lambda: os.pwrite(fd, b"# two\n", 12)) == "EINVAL"
    assert code(lambda: os.pwrite(fd, b"# two\n", 0)) == 6
    assert os.writev(fd, [b"# a\n", b"# b\n"]) == 8
    assert os.writev(fd, [b"# a\n# b\n", b"# c\n"]) == 4
    assert code(lambda: os.write(fd, b"nonsense\n")) == "EINVAL"
    os.close(fd)


def test_a_path_is_opened_as_its_writer_would(emulator: Emulator, tmp_path: Path) -> None:
    (emulator.ipe / "enforce").write_text("0")
    rules = tmp_path / "rules"
    rules.write_text("audit\n")
    fd = os.open(emulator.directory / "ima/policy", os.O_WRONLY)
    for path, expected in (
        (rules, len(str(rules))),
        (tmp_path / "none", "ENOENT"),
        (tmp_path, "EINVAL"),
        (emulator.directory / "ipe/enforce", "EINVAL"),
    ):
        assert code(functools.partial(os.write, fd, bytes(path))) == expected, path
    with rules.open("a"):
        assert code(lambda: os.write(fd, bytes(rules))) == "ETXTBSY"
    os.close(fd)


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain-user")


def policies(emu: Runner) -> tuple[str, ...]:
    (emu.place / "denying.pol").write_text(DENYING)
    return ("--boot-policy", str(emu.place / "denying.pol"), "--boot-verified", "/usr", "--fail-on-deny")


@pytest.mark.needs("user-namespaces")
def test_rules_that_are_accepted_are_reported(emu: Runner) -> None:
    done = emu.shell(f"printf 'audit\\n' > rules; printf %s \"$PWD/rules\" > {NODE}", "--boot-verified", "/")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "write to ima/policy of sh (pid " in done.stderr
    assert "1 rule(s) of IMA are not in force" in done.stderr


@pytest.mark.needs("user-namespaces")
def test_a_denied_file_is_reported(emu: Runner) -> None:
    done = emu.shell(f"printf 'audit\\n' > rules; echo \"$PWD/rules\" > {NODE} || echo refused", *policies(emu))
    assert done.returncode == 1, done.stderr
    assert done.stdout == "refused\n"
    assert "POLICY     KERNEL_READ" in done.stderr


@pytest.mark.needs("user-namespaces")
def test_rules_that_are_not_judged_fail_a_run(emu: Runner) -> None:
    done = emu.shell(f"echo 'appraise func=BPRM_CHECK' > {NODE} || echo refused")
    assert (done.returncode, done.stdout) == (125, "refused\n"), done.stderr
    assert "could not be judged: 1" in done.stderr


@pytest.mark.needs("user-namespaces")
def test_one_writer_after_the_other(emu: Runner) -> None:
    script = f"for i in 1 2 3 4 5; do echo '# nothing' > {NODE} || exit 9; done"
    done = emu.run(
        "run",
        "--",
        sys.executable,
        "-c",
        f"import subprocess; raise SystemExit(subprocess.call({['sh', '-c', script]!r}))",
    )
    assert done.returncode == 0, done.stderr
