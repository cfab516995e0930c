"""Executions under a policy: what is asked, in which order, in whose name, and how a denial ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.integrity.facts import Digest, Facts
from tests.exec_hook.tracee_harness import Rehearsal

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

BOOT_ONLY = "DEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
SIGNED_ONLY = "DEFAULT action=ALLOW\nDEFAULT op=EXECUTE action=DENY\nop=EXECUTE dmverity_signature=TRUE action=ALLOW\n"
ALLOW_ALL = "DEFAULT action=ALLOW\n"
SIGNED = Facts(dmverity_roothash=Digest("sha256", b"\1" * 32), dmverity_signature=True)


@pytest.fixture
def inside(tree: Path, tmp_path: Path) -> Iterator[Rehearsal]:
    with Rehearsal(tmp_path / "root", tree) as rehearsal:
        rehearsal.facts.devices[rehearsal.device_of("/t")] = Facts(boot_verified=True)
        yield rehearsal


@pytest.fixture
def no_loader(inside: Rehearsal) -> Rehearsal:
    """The dynamic program is trusted, its loader is not: the denial comes after the point of no return."""
    inside.facts.paths[b"/t/bin/hello"] = SIGNED
    inside.policy(SIGNED_ONLY)
    return inside


DEATHS = {
    "plain": "os.execve('/t/bin/hello', ['x'], {})",
    "ignored": "signal.signal(signal.SIGSEGV, signal.SIG_IGN); os.execve('/t/bin/hello', ['x'], {})",
    "blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV]); os.execve('/t/bin/hello', ['x'], {})",
    "by execveat": "execveat(os.open('/t/bin', 0), b'hello')",
    "from a thread": """
thread = threading.Thread(target=lambda: os.execve('/t/bin/hello', ['x'], {}))
thread.start()
time.sleep(60)
""",
    "from a vfork": """
pid = os.posix_spawn('/t/bin/hello', ['x'], {})
os.kill(os.getpid(), os.WTERMSIG(os.waitpid(pid, 0)[1]))
""",
    "with pending signals": """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
os.execve('/t/bin/hello', ['x'], {})
""",
}


@pytest.mark.parametrize("case", DEATHS)
def test_a_denial_after_the_point_of_no_return_is_deadly(no_loader: Rehearsal, case: str) -> None:
    assert no_loader.run("result = run(lambda: exec(code, globals()))", code=DEATHS[case]) == {"signal": 11}
    assert no_loader.asked() == ["BPRM_CHECK /t/bin/hello", "MMAP /t/bin/hello", "MMAP /lib64/ld-linux-x86-64.so.2"]
    assert [event.file and event.file.path for event in no_loader.notes.denials] == [b"/lib64/ld-linux-x86-64.so.2"]
    assert not no_loader.notes.unjudged


def test_a_shell_sees_its_program_die(no_loader: Rehearsal) -> None:
    no_loader.facts.paths[b"/bin/busybox"] = SIGNED
    script = "trap 'exit 9' SEGV; /t/bin/hello; test $? = 139 && exit 5"
    assert no_loader.run("result = execute('/bin/sh', '-c', script)", script=script) == {"exit": 5}


def test_an_execve_that_fails_anyway_returns(no_loader: Rehearsal) -> None:
    """Denied at MMAP, but the kernel never gets there: the arguments are too long."""
    source = """
        def go():
            try:
                os.execve("/t/bin/hello", ["x"] + ["y" * 100000] * 100, {})
            except OSError as error:
                assert error.errno == 7
                os._exit(6)
        result = run(go)
    """
    assert no_loader.run(source) == {"exit": 6}


def test_a_death_under_a_tracer_is_refused(no_loader: Rehearsal) -> None:
    source = """
        def go():
            call("ptrace", 0, 0, 0, 0)
            os.execve("/t/bin/hello", ["x"], {})
        result = run(go)
    """
    assert no_loader.run(source) == {"error": "EPERM"}
    assert "tracer" in no_loader.notes.unjudged[0][1]


def test_a_killed_caller_is_forgotten(no_loader: Rehearsal) -> None:
    """A process that dies in the middle of a denial leaves nothing behind, and the next one is answered."""
    source = """
        children = []
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os.execve("/t/bin/hello", ["x"], {})
            os.kill(pid, signal.SIGKILL)
            children.append(pid)
        result = sorted({os.WTERMSIG(os.waitpid(pid, 0)[1]) for pid in children})
    """
    assert set(no_loader.run(source)) <= {9, 11}
    assert no_loader.run("result = run(lambda: os.execve('/t/bin/hello', ['x'], {}))") == {"signal": 11}


def test_permissive_executes(inside: Rehearsal) -> None:
    inside.policy(SIGNED_ONLY, enforce=False)
    assert inside.run("result = execute('/t/bin/hello')") == {"exit": 0}
    assert inside.notes.denials == []
    assert all("enforcing=0" in text for text in inside.texts())


LONG = "0123456789abcdefg"
NAMES = {
    "a script": ("execveat(AT_FDCWD, b'/t/script/s.sh')", "s.sh"),
    "a link": ("execveat(AT_FDCWD, b'/t/out')", "out"),
    "a long name": (
        "os.symlink('/t/out', '/run/0123456789abcdefg'); execveat(AT_FDCWD, b'/run/0123456789abcdefg')", LONG[:15],
    ),
    "by descriptor": ("execveat(os.open('/t/out', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)", "hello_static"),
    "a script by descriptor": (
        "os.dup2(os.open('/t/script/s.sh', 0), 9); execveat(9, b'', flags=AT_EMPTY_PATH)", "busybox",
    ),
    "below a directory": ("execveat(os.open('/t', os.O_RDONLY), b'bin/hello_static')", "hello_static"),
    "a memfd with slashes": (
        "execveat(memfd_of('/t/bin/hello_static', 'a/b'), b'', flags=AT_EMPTY_PATH)", "memfd:a/b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_the_new_name_is_the_kernels(inside: Rehearsal, case: str) -> None:
    """The name in MMAP records is the one the kernel gives the process: compared with what it then has."""
    statement, name = NAMES[case]
    inside.policy(ALLOW_ALL)
    source = """
        reader, writer = os.pipe()
        def go():
            call("ptrace", 0, 0, 0, 0)  # stop after the execve, so that the name can be read
            exec(statement, globals())
        pid = os.fork()
        if pid == 0:
            try:
                go()
            finally:
                os._exit(99)
        os.waitpid(pid, 0)
        result = Path(f"/proc/{pid}/comm").read_text().rstrip("\\n")
        call("ptrace", 17, pid, 0, 0)
        os.waitpid(pid, 0)
    """
    assert inside.run(source, statement=statement) == name
    mapped = [text for text in inside.texts() if "ipe_hook=MMAP" in text]
    assert mapped
    assert all(f'comm="{name}"' in text for text in mapped)


def test_a_comm_with_odd_bytes(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    name = b"a\\\n\xff"
    source = """
        def go():
            call("prctl", PR_SET_NAME, name, 0, 0, 0)
            os.execve("/t/bin/hello_static", ["x"], {})
        result = run(go)
    """
    assert inside.run(source, name=name) == {"exit": 0}
    assert f"comm={name.hex().upper()} " in inside.texts()[0]


def test_paths_with_odd_bytes(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = r"""
        name = b"/run/\xff \n\""
        os.symlink("/t/bin/hello_static", name)
        os.link("/run/t/bin/hello_static", name + b"2")
        result = [run(lambda: execveat(AT_FDCWD, name)), run(lambda: execveat(AT_FDCWD, name + b"2"))]
    """
    assert inside.run(source) == [{"exit": 0}] * 2
    assert inside.asked()[0] == "BPRM_CHECK /t/bin/hello_static"
    assert inside.asked()[2] == "BPRM_CHECK " + b'/run/\xff \n"2'.hex().upper()


def test_the_pid_is_that_of_the_machines_namespace(inside: Rehearsal) -> None:
    """A container's process is audited by its pid in the initial namespace."""
    inside.policy(ALLOW_ALL)
    source = """
        reader, writer = os.pipe()
        def go():
            call("unshare", 0x20000000)
            pid = os.fork()
            if pid == 0:
                os.read(reader, 1)
                os.execve("/t/bin/hello_static", ["x"], {})
            children = Path("/proc/self/task/%d/children" % os.getpid()).read_text()
            Path("/run/child").write_text(children.strip())
            os.write(writer, b"x")
            os.wait()
        result = run(go), Path("/run/child").read_text()
    """
    ended, pid = inside.run(source)
    assert ended == {"exit": 0}
    assert pid != "1"
    assert inside.texts()
    assert all(f"pid={pid} " in text for text in inside.texts())


def test_a_thread_audits_with_its_own_name_and_the_process_id(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        def go():
            def execute_from_thread():
                call("prctl", PR_SET_NAME, b"worker", 0, 0, 0)
                os.execve("/t/bin/hello_static", ["x"], {})
            Path("/run/pid").write_text(str(os.getpid()))
            threading.Thread(target=execute_from_thread).start()
            time.sleep(60)
        result = run(go), Path("/run/pid").read_text()
    """
    ended, pid = inside.run(source)
    assert ended == {"exit": 0}
    assert f'pid={pid} comm="worker" ' in inside.texts()[0]
    assert f'pid={pid} comm="hello_static" ' in inside.texts()[1]


@pytest.mark.needs("root")
def test_what_permissions_forbid_raises_no_event(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        put("/run/mine", Path("/t/bin/hello_static").read_bytes(), 0o700)
        os.mkdir("/run/closed", 0o700)
        put("/run/closed/open", Path("/t/bin/hello_static").read_bytes(), 0o755)
        def go(path):
            os.setgroups([])
            os.setresgid(1000, 1000, 1000)
            os.setresuid(1000, 1000, 1000)
            os.execve(path, ["x"], {})
        result = [run(lambda: go(path)) for path in ("/run/mine", "/run/closed/open", "/run/closed/nothing")]
    """
    assert inside.run(source) == [{"error": "EACCES"}] * 3
    assert inside.records == []


def test_interpreters_are_asked_about_in_turn(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = r"""
        put("/run/outer", b"#!/run/inner -x\n")
        put("/run/inner", b"#! /bin/sh\nexit 4\n")
        result = execute("/run/outer")
    """
    assert inside.run(source) == {"error": "EACCES"}
    assert inside.asked() == ["BPRM_CHECK /run/outer"]
    inside.policy(BOOT_ONLY, enforce=False)
    assert inside.run("result = execute('/run/outer')") == {"exit": 4}
    assert inside.asked() == [
        "BPRM_CHECK /run/outer", "BPRM_CHECK /run/inner", "BPRM_CHECK /bin/busybox", "MMAP /bin/busybox",
    ]  # fmt: skip


def test_too_many_interpreters(inside: Rehearsal) -> None:
    """The sixth script in a row is still asked about, then the kernel gives up."""
    inside.policy(ALLOW_ALL)
    source = r"""
        put("/run/0", b"#!/bin/sh\nexit 4\n")
        for i in range(1, 8):
            put(f"/run/{i}", b"#!/run/%d\n" % (i - 1))
        result = execute("/run/4"), execute("/run/5")
    """
    assert inside.run(source) == [{"exit": 4}, {"error": "ELOOP"}]
    assert inside.asked() == [
        *(f"BPRM_CHECK /run/{i}" for i in (4, 3, 2, 1, 0)), "BPRM_CHECK /bin/busybox", "MMAP /bin/busybox",
        *(f"BPRM_CHECK /run/{i}" for i in (5, 4, 3, 2, 1, 0)),
    ]  # fmt: skip


@pytest.mark.parametrize(("offset", "value"), [(18, b"\x03\x00"), (4, b"\x01")], ids=["i386", "x32"])
def test_32_bit_programs_are_not_judged(inside: Rehearsal, offset: int, value: bytes) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        program = Path("/t/bin/hello_static").read_bytes()
        put("/run/other", program[:offset] + value + program[offset + len(value):])
        result = execute("/run/other")
    """
    assert inside.run(source, offset=offset, value=value) == {"error": "EPERM"}
    assert inside.asked() == ["BPRM_CHECK /run/other"]
    assert "32-bit" in inside.notes.unjudged[0][1]


def test_a_denied_script_needs_no_judgement_of_its_interpreter(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = r"""
        program = Path("/t/bin/hello_static").read_bytes()
        put("/run/other", program[:18] + b"\x03\x00" + program[20:])
        put("/run/script", b"#!/run/other\n")
        result = execute("/run/script")
    """
    assert inside.run(source) == {"error": "EACCES"}
    assert inside.notes.unjudged == []


def test_segments_are_asked_about_one_by_one(inside: Rehearsal) -> None:
    """Every executable PT_LOAD with content in the file is one question."""
    inside.policy(ALLOW_ALL)
    source = r"""
        program = bytearray(Path("/t/bin/hello_static").read_bytes())
        offset, count = struct.unpack_from("<Q", program, 32)[0], struct.unpack_from("<H", program, 56)[0]
        result = 0
        for at in range(offset, offset + 56 * count, 56):
            kind, flags = struct.unpack_from("<II", program, at)
            size = struct.unpack_from("<Q", program, at + 32)[0]
            if kind == 1 and size:
                struct.pack_into("<I", program, at + 4, flags | 1)
                result += 1
        put("/run/all", bytes(program))
        assert execute("/run/all") == {"exit": 0}
    """
    segments = inside.run(source)
    assert segments > 1
    assert inside.asked() == ["BPRM_CHECK /run/all", *["MMAP /run/all"] * segments]


def test_an_elf_interpreter_of_another_type_dies_when_the_program_is_mapped(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = r"""
        static, dynamic = (bytearray(Path(f"/t/bin/{name}").read_bytes()) for name in ("hello_static", "hello"))
        static[16] = 1
        put("/run/relocatable", bytes(static))
        at = dynamic.index(b"/lib64/ld-linux-x86-64.so.2\0")
        dynamic[at:at + 28] = b"/run/relocatable".ljust(28, b"\0")
        put("/run/late", bytes(dynamic))
        result = execute("/run/late")
    """
    assert inside.run(source) == {"signal": 11}
    assert inside.asked() == ["BPRM_CHECK /run/late", "MMAP /run/late"]


@pytest.mark.parametrize(("offset", "value", "asked"), [(8, 1, 0), (40, 1, 1)], ids=["unaligned", "longer than memory"])
def test_what_cannot_be_mapped_ends_the_loading(inside: Rehearsal, offset: int, value: int, asked: int) -> None:
    """The first executable segment gets an impossible offset or size: neither it nor what follows is asked about."""
    inside.policy(ALLOW_ALL)
    source = r"""
        program = bytearray(Path("/t/bin/hello").read_bytes())
        headers, count = struct.unpack_from("<Q", program, 32)[0], struct.unpack_from("<H", program, 56)[0]
        at = next(at for at in range(headers, headers + 56 * count, 56)
                  if struct.unpack_from("<I", program, at)[0] == 1 and program[at + 4] & 1)
        struct.pack_into("<Q", program, at + offset, value)
        put("/run/late", bytes(program))
        result = execute("/run/late")
    """
    assert inside.run(source, offset=offset, value=value) == {"signal": 11}
    assert inside.asked() == ["BPRM_CHECK /run/late", *["MMAP /run/late"] * asked]


def test_what_somebody_writes_to_is_no_question(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = r"""
        put("/run/busy", Path("/t/bin/hello_static").read_bytes())
        put("/t/starter", b"#!/run/busy\n")
        writer = os.open("/run/busy", os.O_WRONLY)
        result = [
            execute("/run/busy"),
            execute("/t/starter"),
            outcome(lambda: execveat(AT_FDCWD, b"/run/busy", flags=AT_EXECVE_CHECK)),
        ]
        os.close(writer)
    """
    assert inside.run(source) == [{"error": "ETXTBSY"}] * 3
    assert inside.asked() == ["BPRM_CHECK /t/starter"]


def test_without_a_policy_all_is_allowed_and_nothing_audited(inside: Rehearsal) -> None:
    inside.policy("")
    assert inside.run("result = execute('/run/t/bin/hello')") == {"exit": 0}
    assert inside.records == []
    assert inside.calls


@pytest.mark.parametrize(("kernel", "answer"), [("linux-6.12", "EINVAL"), ("linux-7.3", "ENOENT")])
def test_check_needs_a_file(inside: Rehearsal, kernel: str, answer: str) -> None:
    inside.policy(ALLOW_ALL, kernel=kernel)
    source = """
        result = [outcome(lambda: execveat(AT_FDCWD, path, flags=AT_EXECVE_CHECK)) for path in (b"/no", b"/t/mod.ko")]
    """
    assert inside.run(source)[0]["error"] == answer
    assert inside.run(source)[1]["error"] == ("EACCES" if answer == "ENOENT" else answer)
    assert inside.records == []


def test_a_check_by_descriptor_executes_nothing(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = """
        fds = [os.open(path, os.O_RDONLY) for path in ("/t/bin/hello", "/run/t/bin/hello")]
        result = [outcome(lambda: execveat(fd, b"", flags=AT_EMPTY_PATH | AT_EXECVE_CHECK)) for fd in fds]
    """
    assert inside.run(source) == [{"ok": 0}, {"error": "EACCES"}]
    assert inside.asked() == ["BPRM_CREDS_FOR_EXEC /t/bin/hello", "BPRM_CREDS_FOR_EXEC /run/t/bin/hello"]
