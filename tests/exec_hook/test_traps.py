"""Traps that a part of the emulator sets: who is asked, and what we do ourselves in the place of the kernel."""

import errno
import os
from pathlib import Path

import pytest

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.plan import Install, Perform, Plan, Return
from ipe_emu.exec_hook.traps import Trap
from tests.exec_hook.tracee_harness import Rehearsal

pytestmark = [pytest.mark.timeout(60), pytest.mark.needs("user-namespaces")]

# A call that nobody makes by chance: its first argument says what is to happen.
CALLS = """
    def ask(what):
        try:
            return syscalls.call("swapon", what, 0)
        except OSError as error:
            return errno_name(error.errno)
    result = [ask(what) for what in range(8)]
"""


def fails(error: Exception) -> int:
    raise error


def first(_caller: Caller, args: tuple[int, ...]) -> Plan | None:
    return Plan(Return(100)) if args[0] == 0 else None


def second(caller: Caller, args: tuple[int, ...]) -> Plan | None:
    answers: dict[int, Perform | Install] = {
        1: Perform(lambda: caller.subject.pid > 0),
        2: Perform(lambda: fails(KernelError(errno.EDOM))),
        3: Perform(lambda: fails(NotJudgedError("no idea"))),
        4: Perform(lambda: fails(OSError(errno.EXDEV, "it broke"))),
        5: Install(lambda: fails(KernelError(errno.ENXIO)), close_on_exec=True),
    }
    return Plan(answers[args[0]]) if args[0] in answers else None


def test_who_answers_and_what_comes_of_it(tmp_path: Path) -> None:
    with Rehearsal(tmp_path / "root", traps=[Trap("swapon", first), Trap("swapon", second)]) as rehearsal:
        # What nobody knows goes on to the kernel, which has no file at address 6.
        assert rehearsal.run(CALLS) == [100, 1, "EDOM", "EPERM", "EPERM", "ENXIO", "EFAULT", "EFAULT"]
        reasons = [reason for _, reason in rehearsal.notes.unjudged]
        assert reasons == ["no idea", "OSError: [Errno 18] it broke"]


def test_a_trap_comes_before_what_the_hook_does_itself(tmp_path: Path) -> None:
    def no_program(caller: Caller, _args: tuple[int, ...]) -> Plan | None:
        path = caller.tracee.string(_args[0], 4096)
        return Plan(Perform(lambda: fails(KernelError(errno.ENOMEM)))) if path == b"/nonsense" else None

    with Rehearsal(tmp_path / "root", traps=[Trap("execve", no_program)]) as rehearsal:
        rehearsal.policy("DEFAULT action=ALLOW\n")
        assert rehearsal.run("result = [execute(p) for p in ('/nonsense', '/bin/true', '/bin/absent')]") == [
            {"error": "ENOMEM"},
            {"exit": 0},
            {"error": "ENOENT"},
        ]


@pytest.mark.parametrize("close_on_exec", [True, False])
def test_a_descriptor_of_ours_is_put_into_the_caller(tmp_path: Path, close_on_exec: bool) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"from outside")

    def give(_caller: Caller, _args: tuple[int, ...]) -> Plan:
        return Plan(Install(lambda: os.open(content, os.O_RDONLY | os.O_CLOEXEC), close_on_exec=close_on_exec))

    before = len([*Path("/proc/self/fd").iterdir()])
    with Rehearsal(tmp_path / "root", traps=[Trap("swapon", give)]) as rehearsal:
        assert rehearsal.run("""
            fd = syscalls.call("swapon", 0, 0)
            result = [os.read(fd, 100).decode(), os.get_inheritable(fd)]
            os.close(fd)
        """) == ["from outside", not close_on_exec]
        assert rehearsal.run("""
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                result = outcome(lambda: syscalls.call("swapon", 0, 0))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        """) == {"error": "EMFILE"}
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_memory_is_read_and_written(tmp_path: Path) -> None:
    def reverse(caller: Caller, args: tuple[int, ...]) -> Plan:
        data = caller.copy_in(args[0], 6)

        def act() -> int:
            caller.copy_out(args[1], data[::-1])
            return len(data)

        return Plan(Perform(act))

    with Rehearsal(tmp_path / "root", traps=[Trap("swapon", reverse)]) as rehearsal:
        assert rehearsal.run("""
            place = syscalls.writable(6)
            page = mmap_(4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            kernel = 1 << 63
            result = [syscalls.call("swapon", b"abcdef", place), place.raw.decode()]
            result += [outcome(lambda: syscalls.call("swapon", b"abcdef", a)) for a in (0, page, kernel)]
            result += [outcome(lambda: syscalls.call("swapon", a, place)) for a in (0, kernel)]
        """) == [6, "fedcba", *[{"error": "EFAULT"}] * 5]
