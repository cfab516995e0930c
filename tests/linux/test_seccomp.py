"""The filter as a program, run by a small interpreter of our own, and the listener with real processes."""

import errno
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from ipe_emu.exec_hook.hook import rules
from ipe_emu.linux import seccomp, syscalls
from ipe_emu.linux.seccomp import Action, AnyBit, Listener, Masked, Notification, Rule, assemble

pytestmark = pytest.mark.timeout(60)

ALLOW = 0x7FFF0000
PR_SET_NO_NEW_PRIVS = 38
X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
TABLES = {"x86_64": (X86_64, syscalls.NUMBERS_X86_64), "aarch64": (AARCH64, syscalls.NUMBERS_AARCH64)}


def verdict(program: bytes, arch: int, number: int, *args: int) -> int:
    """Run a program of the kinds of instruction that the filter uses (load, and, jump, return)."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(args + (0,) * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        opcode, yes, no, value = code[at]
        at += 1
        if opcode == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif opcode == 0x54:
            accumulator &= value
        elif opcode == 0x06:
            return int(value)
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[opcode]
            at += yes if taken else no


@pytest.mark.parametrize("machine", TABLES)
def test_what_the_hook_wants_to_see(machine: str) -> None:
    arch, numbers = TABLES[machine]
    program = assemble(rules(securityfs=True), machine, numbers)
    always = (
        "execve", "execveat", "finit_module", "init_module", "kexec_load", "kexec_file_load", "remap_file_pages",
        "sendfile", "splice", "copy_file_range",
    )  # fmt: skip
    for name in always:
        assert verdict(program, arch, numbers[name]) == Action.NOTIFY, name
    for name in ("mmap", "mprotect", "pkey_mprotect"):
        for protection in range(16):
            want = Action.NOTIFY if protection & 4 else ALLOW
            # A high half of the argument, or the other arguments, play no part.
            assert verdict(program, arch, numbers[name], 4, 4, protection | 4 << 32, 4, 4, 4) == want, (
                name,
                protection,
            )
    assert verdict(program, arch, numbers["shmat"], 0, 0, 0o100000) == Action.NOTIFY
    assert verdict(program, arch, numbers["shmat"], 0, 0, 0o010000) == ALLOW
    personality = numbers["personality"]
    assert verdict(program, arch, personality, 0xFFFFFFFF) == ALLOW
    assert verdict(program, arch, personality, 0x0040000) == ALLOW
    assert verdict(program, arch, personality, 0x0400000) == Action.NOTIFY
    assert verdict(program, arch, personality, 0x0100000) == Action.NOTIFY
    trapped = {numbers[rule.syscall] for rule in rules(securityfs=True) if rule.syscall in numbers}
    for number in set(range(600)) - trapped:
        assert verdict(program, arch, number, *[0xFFFFFFFFFFFFFFFF] * 6) == ALLOW, number


def test_without_a_securityfs_copying_is_let_through() -> None:
    arch, numbers = TABLES["x86_64"]
    program = assemble(rules(securityfs=False), "x86_64", numbers)
    assert verdict(program, arch, numbers["sendfile"]) == ALLOW
    assert verdict(program, arch, numbers["execve"]) == Action.NOTIFY


@pytest.mark.parametrize("machine", TABLES)
def test_other_architectures_have_no_calls(machine: str) -> None:
    arch, numbers = TABLES[machine]
    program = assemble(rules(securityfs=True), machine, numbers)
    for other in {X86_64, I386, AARCH64, ARM, 0} - {arch}:
        for number in (0, 1, 11, 59, 221, 500):
            assert verdict(program, other, number) == Action.ENOSYS


def test_x32_calls_do_not_exist_and_skipped_ones_stay_skipped() -> None:
    arch, numbers = TABLES["x86_64"]
    program = assemble(rules(securityfs=True), "x86_64", numbers)
    for number in (0, 59, 520, 545, 0x3FFFFFFF):
        assert verdict(program, arch, 0x40000000 | number) == Action.ENOSYS
    assert verdict(program, arch, 0xFFFFFFFE) == Action.ENOSYS
    assert verdict(program, arch, 0xFFFFFFFF) == ALLOW
    assert verdict(program, arch, numbers["uselib"]) == Action.ENOSYS


def test_several_rules_for_one_call() -> None:
    arch, numbers = TABLES["x86_64"]
    ioctl = numbers["ioctl"]
    mapper = Rule("ioctl", Action.NOTIFY, Masked(1, 0xFF00, 0xFD00))
    block = Rule("ioctl", Action.ENOSYS, Masked(1, 0xFF00, 0x1200))
    program = assemble([mapper, Rule("execve", Action.NOTIFY), block], "x86_64", numbers)
    wanted = {0xC138FD00: Action.NOTIFY, 0xFD: ALLOW, 0x1272: Action.ENOSYS, 0x1272 << 32: ALLOW, 0xFF00: ALLOW}
    for command, want in wanted.items():
        assert verdict(program, arch, ioctl, 0xFD00, command, 0xFD00) == want, hex(command)
    assert verdict(program, arch, numbers["execve"]) == Action.NOTIFY
    program = assemble([mapper, Rule("ioctl", Action.NOTIFY), block], "x86_64", numbers)
    for command in wanted:
        assert verdict(program, arch, ioctl, 0, command) == Action.NOTIFY


def test_impossible_filters_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="vax"):
        assemble([Rule("execve", Action.NOTIFY)], "vax", {})


def test_a_misspelt_call_is_no_rule() -> None:
    with pytest.raises(ValueError, match="execv is known"):
        assemble([Rule("execv", Action.NOTIFY)], "x86_64", syscalls.NUMBERS_X86_64)


def test_a_call_that_an_architecture_lacks_has_no_rule() -> None:
    rule = Rule("uselib", Action.NOTIFY, AnyBit(0, 1))
    assert assemble([rule], "aarch64", syscalls.NUMBERS_AARCH64) == assemble([], "aarch64", syscalls.NUMBERS_AARCH64)


class Child:
    """A process under a filter that hands over one call that no C library uses by itself."""

    def __init__(self, body: str) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                syscalls.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                fd = seccomp.install([Rule("remap_file_pages", Action.NOTIFY)])
                socket.send_fds(theirs, [b"L"], [fd])
                os.close(fd)
                exec(body, globals() | {"theirs": theirs})
            finally:
                os._exit(99)
        theirs.close()
        self.channel = ours
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        self.listener = Listener(fds[0])

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.listener.close()
        child.channel.close()


# The four answers: each child exits with what the call gave it.
CALL = """
try:
    os._exit(syscalls.call("remap_file_pages", 1, 2, 3, 4, 5))
except OSError as error:
    os._exit(error.errno)
"""


def test_the_four_answers(children: list[Child]) -> None:
    answers: list[tuple[Callable[[Child, Notification], None], int]] = [
        (lambda child, call: child.listener.fail(call, errno.EXDEV), errno.EXDEV),
        (lambda child, call: child.listener.reply(call, 42), 42),
        (lambda child, call: child.listener.continue_(call), errno.EINVAL),  # of the kernel's own
        (lambda child, _: child.listener.close(), errno.ENOSYS),
    ]
    for answer, status in answers:
        child = Child(CALL)
        call = child.listener.receive(10_000)
        assert call is not None
        assert (call.pid, call.name, call.args[:5]) == (child.pid, "remap_file_pages", (1, 2, 3, 4, 5))
        assert child.listener.valid(call)
        answer(child, call)
        assert child.status() == status
        if status != errno.ENOSYS:
            children.append(child)
            assert child.listener.receive(10_000) is None
        else:
            child.channel.close()


def test_a_caller_that_dies_is_no_error(children: list[Child]) -> None:
    child = Child(CALL)
    children.append(child)
    call = child.listener.receive(10_000)
    assert call is not None
    os.kill(child.pid, signal.SIGKILL)
    assert child.status() == -signal.SIGKILL
    assert not child.listener.valid(call)
    child.listener.fail(call, errno.EPERM)
    child.listener.continue_(call)
    assert child.listener.receive(10_000) is None


def test_a_signal_does_not_repeat_a_call(children: list[Child]) -> None:
    """Once received, a call is interrupted by nothing that does not kill (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)."""
    child = Child("signal.signal(signal.SIGUSR1, lambda *_: None)\n" + CALL)
    children.append(child)
    call = child.listener.receive(10_000)
    assert call is not None
    for _ in range(5):
        os.kill(child.pid, signal.SIGUSR1)
    with pytest.raises(TimeoutError):
        child.listener.receive(100)
    assert child.listener.valid(call)
    child.listener.reply(call, 7)
    assert child.status() == 7


def test_the_second_listener_of_a_tree_is_refused(children: list[Child]) -> None:
    child = Child("""
try:
    seccomp.install([Rule("uselib", Action.NOTIFY)])
except OSError as error:
    os._exit(error.errno)
""")
    children.append(child)
    assert child.status() == errno.EBUSY
