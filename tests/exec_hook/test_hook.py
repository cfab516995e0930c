"""The hook's own behaviour: copying from the securityfs, what cannot be judged, failures inside."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.errors import NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.exec_hook.hook import ExecHook
from ipe_emu.integrity.declared import Declared
from ipe_emu.integrity.facts import Facts
from ipe_emu.linux import syscalls
from ipe_emu.lsm import Decision
from ipe_emu.policy.rule import Operation
from tests.exec_hook.tracee_harness import Notes, Rehearsal, model

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

ALLOW_ALL = "DEFAULT action=ALLOW\n"

COPY = """
    import_ = os.open(origin, os.O_RDONLY)
    export = os.open(target, os.O_RDWR)
    pipe = os.pipe()
    os.write(pipe[1], b"x" * 10)
    result = [
        outcome(lambda: os.sendfile(export, import_, 0, 10)),
        outcome(lambda: os.splice(import_, pipe[1], 10)),
        outcome(lambda: os.splice(pipe[0], export, 10)),
        outcome(lambda: os.copy_file_range(import_, export, 10)),
        outcome(lambda: os.sendfile(99, import_, 0, 10)),
        outcome(lambda: os.splice(99, 99, 10)),
    ]
    for fd in (import_, export, *pipe):
        os.close(fd)
"""
FILES = """
    Path("/run/from").write_bytes(b"content")
    Path("/run/to").write_bytes(b"")
    Path("/t/node").write_bytes(b"content")
    result = 0
"""
EINVAL, EBADF, EXDEV, EISDIR, OK = *({"error": e} for e in ("EINVAL", "EBADF", "EXDEV", "EISDIR")), {"ok": 0}


@pytest.fixture
def inside(tree: Path, tmp_path: Path) -> Iterator[Rehearsal]:
    """A rehearsal in which the initramfs stands for the securityfs: what matters is the device."""
    with Rehearsal(tmp_path / "root", tree, securityfs=-1) as rehearsal:
        rehearsal.securityfs = rehearsal.device_of("/t")
        rehearsal.policy(ALLOW_ALL)
        rehearsal.run(FILES)
        yield rehearsal


def test_copying_from_a_node(inside: Rehearsal) -> None:
    result = inside.run(COPY, origin="/t/node", target="/run/to")
    assert result == [EINVAL, EINVAL, OK, EXDEV, EBADF, EBADF]


def test_copying_to_a_node(inside: Rehearsal) -> None:
    result = inside.run(COPY, origin="/run/from", target="/t/node")
    assert result == [EINVAL, OK, EINVAL, EXDEV, EBADF, EBADF]


# What a User-Mode Linux 6.12.118 and 7.3.4 answered; from and to are the open(2) of each.
NODE, FILE = "'/t/node', ", "'/run/from', "
COPYING = {
    "node to node": (f"{NODE} 0", f"{NODE} 1", EINVAL, EINVAL, 0),
    "node to what is not open for writing": (f"{NODE} 0", f"{FILE} 0", EBADF, EBADF, EBADF),
    "what is not open for reading": (f"{NODE} 1", f"{FILE} 1", EBADF, EBADF, EBADF),
    "to a node not open for writing": (f"{FILE} 0", f"{NODE} 0", EBADF, EBADF, EBADF),
    "to append to a node": (f"{FILE} 0", f"{NODE} os.O_WRONLY | os.O_APPEND", EINVAL, EINVAL, EBADF),
    "node to append": (f"{NODE} os.O_RDWR", f"{FILE} os.O_WRONLY | os.O_APPEND", EINVAL, EINVAL, EBADF),
    "node to a directory": (f"{NODE} 0", "'/run', 0", EBADF, EBADF, EISDIR),
    "a directory to a node": ("'/run', 0", f"{NODE} 1", EINVAL, EINVAL, EISDIR),
    "node to a device": (f"{NODE} 0", "'/dev/null', 1", EINVAL, EINVAL, EINVAL),
    "an empty file to a node": ("'/run/to', 0", f"{NODE} 1", 0, EINVAL, EXDEV),
    "to a node that can be read too": (f"{FILE} 0", f"{NODE} os.O_RDWR", EINVAL, EINVAL, EXDEV),
    "a node by its path alone": (f"{NODE} os.O_PATH", f"{FILE} 1", EBADF, EBADF, EBADF),
}


@pytest.mark.parametrize("case", COPYING)
def test_copying_as_the_kernel_does(inside: Rehearsal, case: str) -> None:
    source, target, *expected = COPYING[case]
    code = f"""
        Path("/t/node").write_bytes(b"")
        def returned(function):
            try:
                return function()
            except OSError as error:
                return {{"error": errno_name(error.errno)}}
        source, target = os.open({source}), os.open({target})
        result = [
            returned(lambda: os.sendfile(target, source, None, 10)),
            returned(lambda: os.splice(source, target, 10)),
            returned(lambda: os.copy_file_range(source, target, 10)),
        ]
        for fd in (source, target):
            os.close(fd)
    """
    assert inside.run(code) == expected


def test_a_doubt_that_a_rule_asks_about(inside: Rehearsal) -> None:
    """The call fails, without a record; where no rule asks, it is judged as ever."""
    code = """
        result = outcome(lambda: os.posix_spawn("/bin/busybox", ["busybox", "true"], {}))
    """
    inside.facts.devices[inside.device_of("/bin/busybox")] = Facts(dmverity_in_doubt="nobody knows")
    inside.policy("DEFAULT action=ALLOW\nop=EXECUTE dmverity_signature=TRUE action=DENY\n")
    assert inside.run(code) == {"error": "EPERM"}
    ((call, reason),) = inside.notes.unjudged
    assert (call, inside.records) == ("execve", [])
    assert reason == "nobody knows; and a rule asks for it: op=EXECUTE dmverity_signature=TRUE action=DENY"
    inside.policy(ALLOW_ALL)
    assert inside.run(code) == {"ok": 0}
    assert not inside.notes.unjudged


def test_copying_elsewhere(inside: Rehearsal) -> None:
    result = inside.run(COPY, origin="/run/from", target="/run/to")
    assert result == [OK, OK, OK, OK, EBADF, EBADF]
    assert inside.notes.unjudged == []


def test_tools_fall_back_to_reading(inside: Rehearsal) -> None:
    """busybox cat uses sendfile first; what it prints of a node must be its content."""
    source = """
        target = os.open("/run/printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        def go():
            os.dup2(target, 1)
            os.execve("/bin/busybox", ["cat", "/t/node"], {})
        ended = run(go)
        os.close(target)
        result = ended, Path("/run/printed").read_text()
    """
    assert inside.run(source) == [{"exit": 0}, "content"]


class Broken:
    """A judge that fails."""

    def __init__(self) -> None:
        self.profile = model("", lambda _: None).profile

    def passes(self, operation: Operation, facts: Facts) -> bool:
        return False

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        raise RuntimeError("the control socket is gone")


class PassesOnly(Broken):
    """A judge that lets pass what is boot verified, and must not be asked about it again."""

    def passes(self, operation: Operation, facts: Facts) -> bool:
        return facts.boot_verified


def test_what_passes_is_not_put_to_the_judge(inside: Rehearsal) -> None:
    inside.facts.devices[inside.device_of("/t")] = Facts(boot_verified=True)
    inside.judge(PassesOnly())
    source = """
        shutil.copy("/t/bin/hello_static", "/run/copy")
        put("/t/hello.sh", b"#!/t/bin/hello_static\\n")
        result = [
            *(execute(path) for path in ("/t/bin/hello", "/t/bin/hello_static", "/t/hello.sh")),
            outcome(lambda: map_memory("/t/bin/hello", "rx")),
            execute("/run/copy"),
        ]
    """
    assert inside.run(source) == [{"exit": 0}] * 3 + [{"ok": 0}, {"error": "EPERM"}]
    assert [call for call, _ in inside.notes.unjudged] == ["execve"]


def test_what_is_wrong_with_a_call_that_passes_its_kernel_says(inside: Rehearsal) -> None:
    inside.facts.devices[inside.device_of("/t")] = Facts(boot_verified=True)
    inside.judge(PassesOnly())
    source = """
        for name, mode in (("plain", 0o644), ("busy", 0o755)):
            shutil.copy("/t/bin/hello_static", "/t/" + name)
            os.chmod("/t/" + name, mode)
        writer = os.open("/t/busy", os.O_WRONLY)
        result = [execute("/t/plain"), execute("/t/busy"), execute("/t/nowhere"), execute("/t")]
    """
    assert inside.run(source) == [{"error": name} for name in ("EACCES", "ETXTBSY", "ENOENT", "EACCES")]
    assert inside.notes.unjudged == []


class BrokenFacts:
    """Facts that cannot be had."""

    def facts_of(self, *_: Any) -> Facts:
        raise NotJudgedError("who knows")


class Noted:
    """Facts that note which file they were asked for, as the path on its file system."""

    def __init__(self) -> None:
        self.paths: list[bytes] = []

    def facts_of(self, place: Any, *_: Any) -> Facts:
        self.paths.append(place.path)
        return Facts()


def test_where_a_file_lies_is_known_after_mounts_and_files_move(inside: Rehearsal) -> None:
    inside.facts = noted = Noted()
    inside.policy(ALLOW_ALL)
    source = """
        def go():
            call("unshare", CLONE_NEWNS)
            for name in ("a", "b", "c"):
                os.makedirs("/run/moving/" + name)
            call("mount", b"x", b"/run/moving/a", b"tmpfs", 0, None)
            os.mkdir("/run/moving/a/in")
            for name in ("a/p", "a/in/q"):
                put("/run/moving/" + name, b"neither a script nor a program")
            def ask(path):
                assert execute("/run/moving/" + path) == {"error": "ENOEXEC"}
            ask("a/p")
            ask("a/in/q")
            ask("a/in/q")
            call("mount", b"/run/moving/a", b"/run/moving/b", None, 8192, None)
            ask("b/p")
            call("mount", b"/run/moving/b/in", b"/run/moving/c", None, 4096, None)
            ask("c/q")
            os.mkdir("/run/moving/a/in")
            call("mount", b"/run/moving/b", b"/run/moving/a/in", None, 8192, None)
            os.rename("/run/moving/a/in/p", "/run/moving/a/in/q")
            ask("a/in/q")
        result = run(go)
    """
    assert inside.run(source) == {"exit": 0}
    # each twice: in haste, and with care once it is seen that it does not just pass
    assert noted.paths[::2] == noted.paths[1::2] == [b"/p", b"/in/q", b"/in/q", b"/p", b"/in/q", b"/q"]


def test_a_failure_inside_refuses_the_call(inside: Rehearsal) -> None:
    inside.judge(Broken())
    assert inside.run("result = execute('/t/bin/hello'), outcome(lambda: map_memory('-', 'rx'))") == [
        {"error": "EPERM"}, {"error": "EPERM"},
    ]  # fmt: skip
    assert [reason for _, reason in inside.notes.unjudged] == ["RuntimeError: the control socket is gone"] * 2


def test_facts_that_cannot_be_had_refuse_the_call(inside: Rehearsal) -> None:
    inside.facts = BrokenFacts()
    inside.policy(ALLOW_ALL)
    assert inside.run("result = execute('/t/bin/hello')") == {"error": "EPERM"}
    assert inside.notes.unjudged == [("execve", "who knows")]
    assert inside.records == []


def test_an_inherited_personality_is_not_judged() -> None:
    before = syscalls.call("personality", 0xFFFFFFFF)
    syscalls.call("personality", before | 0x0400000)
    try:
        with pytest.raises(NotJudgedError, match="setarch"):
            ExecHook(model("", lambda _: None), Declared(()), Notes(), machine=0)
    finally:
        syscalls.call("personality", before)


def test_no_descriptor_is_left_open(inside: Rehearsal) -> None:
    """An open descriptor of ours would keep the rehearsed machine from unmounting."""
    source = """
        for path in ("/t/bin/hello", "/t/script/i.sh", "/proc/self/exe", "/t/out", "/nothing/at/all", "/t/bin/garbage"):
            execute(path)
        address = map_memory("/t/lib/libf.so", "r")
        outcome(lambda: mprotect(address, 4096, 5))
        outcome(lambda: call("finit_module", os.open("/t/mod.ko", os.O_RDONLY), b"", 0))
        result = 0
    """
    inside.run(source)
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        inside.run(source)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_unmounting_right_after_an_execution(inside: Rehearsal) -> None:
    source = """
        def go():
            call("unshare", CLONE_NEWNS)
            for _ in range(50):
                call("mount", b"x", b"/run/t/lib", b"tmpfs", 0, None)
                Path("/run/t/lib/script").write_text("#!/nothing")
                Path("/run/t/lib/script").chmod(0o755)
                assert execute("/run/t/lib/script") == {"error": "ENOENT"}
                call("umount2", b"/run/t/lib", 0)
        result = run(go)
    """
    assert inside.run(source) == {"exit": 0}
