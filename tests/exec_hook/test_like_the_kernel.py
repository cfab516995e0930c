"""Without a policy, a call under the hook ends exactly as it ends without it.

The kernel of the machine that runs the tests is the judge: each case is done once under the hook and once bare.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exec_hook.tracee_harness import Inside, Rehearsal

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

SETUP = r"""
    os.mkdir("/run/w")
    os.chdir("/run/w")
    hello = Path("/t/bin/hello_static").read_bytes()
    dynamic = Path("/t/bin/hello").read_bytes()
    put("hello", hello)
    put("plain", hello, 0o644)
    os.mkdir("dir")
    put("dir/hello", hello)
    os.symlink("hello", "link")
    os.symlink("/run/w/hello", "absolute")
    os.symlink("../../run/w/dir/../link", "winding")
    os.symlink("dir", "dirlink")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    for i in range(45):
        os.symlink("hello" if i == 0 else "chain%d" % (i - 1), "chain%d" % i)
    os.symlink("/proc/self/exe", "own")
    os.symlink("/proc/self/fd", "fds")
    os.symlink("../../../../../../run/w/hello", "above")
    os.mkfifo("fifo")
    os.chmod("fifo", 0o755)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("socket")
    os.mkdir("noexec")
    call("mount", b"x", b"noexec", b"tmpfs", 8, None)
    put("noexec/hello", hello)
    os.symlink("noexec/hello", "tonoexec")
    put("script", b"#!/bin/sh\nexit 7\n")
    put("nested1", b"#!/run/w/script\n")
    for i in range(2, 9):
        put("nested%d" % i, b"#!/run/w/nested%d\n" % (i - 1))
    put("relative", b"#!script\n")
    put("relative_up", b"#!../w/script\n")
    put("to_noexec", b"#!/run/w/noexec/hello\n")
    put("to_plain", b"#!/run/w/plain\n")
    put("to_dir", b"#!/run/w/dir\n")
    put("to_loop", b"#!/run/w/loop\n")
    put("zero", b"")
    put("one", b"#")
    put("two", b"#!")
    def patched(offset, value, base=hello):
        return base[:offset] + value + base[offset + len(value):]
    put("elf_type", patched(16, b"\x01\x00"))
    put("elf_core", patched(16, b"\x04\x00"))
    put("elf_machine", patched(18, b"\xb7\x00"))
    put("elf_phentsize", patched(54, b"\x39\x00"))
    put("elf_phnum0", patched(56, b"\x00\x00"))
    put("elf_phnum_many", patched(56, b"\xff\xff"))
    put("elf_phoff", patched(32, b"\xff\xff\xff\xff\xff\xff\xff\x7f"))
    put("elf_phoff_far", patched(32, b"\xff\xff\xff\xff\xff\xff\xff\xff"))
    put("elf_short", hello[:60])
    put("elf_header_only", hello[:64])
    put("elf_version", patched(20, b"\x07\x00\x00\x00"))
    put("elf_class0", patched(4, b"\x00"))
    put("elf_class3", patched(4, b"\x03"))
    at = dynamic.index(b"/lib64/ld-linux-x86-64.so.2\0")
    def interpreter(path):
        put("interp_target", dynamic)
        return patched(at, path.ljust(len(b"/lib64/ld-linux-x86-64.so.2"), b"\0"), dynamic)
    put("interp_missing", interpreter(b"/no/such"))
    put("interp_dir", interpreter(b"/run/w/dir"))
    put("interp_plain", interpreter(b"/run/w/plain"))
    put("interp_script", interpreter(b"/run/w/script"))
    put("interp_zero", interpreter(b"/run/w/zero"))
    put("interp_garbage", interpreter(b"/t/bin/garbage"))
    put("rel", patched(16, b"\x01\x00"))
    put("interp_rel", interpreter(b"/run/w/rel"))
    put("interp_class", interpreter(b"/run/w/elf_class3"))
    headers = struct.unpack_from("<Q", dynamic, 32)[0]
    count = struct.unpack_from("<H", dynamic, 56)[0]
    kinds = [struct.unpack_from("<I", dynamic, headers + 56 * i)[0] for i in range(count)]
    def header(kind, offset, value):
        return patched(headers + 56 * kinds.index(kind) + offset, value, dynamic)
    put("interp_behind", header(3, 8, struct.pack("<Q", 1 << 30)))
    put("interp_far", header(3, 8, struct.pack("<Q", (1 << 63) - 2)))
    put("interp_beyond", header(3, 8, struct.pack("<Q", 1 << 63)))
    put("interp_long", header(3, 32, struct.pack("<Q", 4097)))
    put("unaligned", header(1, 8, struct.pack("<Q", 1)))
    put("interp_empty", interpreter(b""))
    put("interp_relative", interpreter(b"plain"))
    put("interp_unterminated", patched(at + len(b"/lib64/ld-linux-x86-64.so.2"), b"x", dynamic))
    put("only_owner", hello, 0o700)
    put("only_others", hello, 0o701)
    put("only_group", hello, 0o610)
    os.mkdir("closed", 0o700)
    put("closed/hello", hello)
    os.mkdir("/run/w/jail")
    put("jail/hello", hello)
    put("jail/script", b"#!/hello\n")
    os.symlink("/hello", "jail/link")
    os.symlink("../../hello", "jail/up")
    os.makedirs("/run/w/" + "d" * 200 + "/" + "e" * 200)
    result = 0
"""

PATHS = [
    "/run/w/hello", "hello", "./hello", "", ".", "..", "/", "//run//w///hello", "/run/w/hello/", "/run/w/hello/.",
    "hello/x", "dir", "dir/", "dir/hello", "dir/../hello", "dir/../../w/hello", "dirlink/hello", "dirlink/../hello",
    "../../../../../run/w/hello", "/../../run/w/hello", "link", "link/", "absolute", "winding", "above", "loop",
    "loop/x", "dangling", "chain38", "chain39", "chain40", "chain44", "nothing", "nothing/x", "plain", "fifo",
    "socket", "/dev/null", "noexec/hello", "tonoexec", "script", "nested1", "nested2", "nested3", "nested4",
    "nested5", "nested6", "nested7", "nested8", "relative", "relative_up", "to_noexec", "to_plain",
    "to_dir", "to_loop", "zero", "one", "two",
    "elf_type", "elf_core", "elf_machine", "elf_phentsize", "elf_phnum0", "elf_phnum_many", "elf_phoff",
    "elf_phoff_far", "elf_short", "elf_header_only", "elf_version", "elf_class0", "elf_class3",
    "interp_rel", "interp_class", "interp_behind", "interp_far", "interp_beyond", "interp_long", "unaligned",
    "interp_missing", "interp_dir",
    "interp_plain", "interp_script", "interp_zero", "interp_garbage", "interp_empty", "interp_relative",
    "interp_unterminated", "only_owner", "only_others", "only_group", "closed/hello",
    "/proc/self/nothing", "/proc/nothing/exe", "/proc/self/cwd/hello", "/proc/thread-self/cwd/hello",
    "/proc/self/root/run/w/hello",
    "/proc/self/cwd/../w/hello", "/proc/self/root/../../run/w/link", "/proc/self/../self/cwd/hello", "/proc/self/",
    "/proc/self/exe/", "/proc/self/exe/x", "/proc/self/fd/77", "fds/77", "/proc/self/status", "/proc/mounts",
    "a" * 255, "a" * 256, "/" + "a" * 4094, "/" + "a" * 4095, "./" * 2000 + "hello",
    "d" * 200 + "/" + "e" * 200 + "/../../hello",
]  # fmt: skip

WHO = {
    "root": "pass",
    "plain user": "os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)",
    "group member": "os.setgroups([0]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)",
    "chrooted": "os.chroot('/run/w/jail')",
    "chrooted and outside": "os.chroot('/run/w/jail'); os.chdir('../../..')",
}


@pytest.fixture(scope="module")
def bare(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("bare"), tree) as inside:
        inside.run(SETUP)
        yield inside


@pytest.fixture(scope="module")
def hooked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    with Rehearsal(tmp_path_factory.mktemp("hooked"), tree) as inside:
        inside.run(SETUP)
        yield inside


def assert_same(bare: Inside, hooked: Rehearsal, source: str, **values: object) -> None:
    hooked.policy("")
    got = hooked.run(source, **values)
    assert not hooked.notes.unjudged
    assert got == bare.run(source, **values)


@pytest.mark.needs("root")
@pytest.mark.parametrize("who", WHO)
def test_paths(bare: Inside, hooked: Rehearsal, who: str) -> None:
    source = """
        def go():
            exec(become)
            os.execve(path, ["x"], {})
        result = []
        os.dup2(os.open("/run/w/dir/hello", os.O_RDONLY), 77)
        for path in paths:
            result.append((path, run(go)))
        os.close(77)
    """
    assert_same(bare, hooked, source, become=WHO[who], paths=PATHS)


SHEBANGS = [
    b"#!/bin/sh\nexit 3\n", b"#! /bin/sh\nexit 3\n", b"#!\t /bin/sh \t\nexit 3\n", b"#!/bin/sh -e\nexit 3\n",
    b"#!/bin/sh -e x y \nexit 3\n", b"#!/bin/sh", b"#!/bin/sh ", b"#!/bin/sh\0\nexit 3\n", b"#!\n", b"#!  \n",
    b"#!\t\n",
    b"#! \0", b"#!\0/bin/sh\n", b"#!\0\n", b"#! \0\n", b"#!/bin/sh\r\nexit 3\n", b"# !/bin/sh\n", b" #!/bin/sh\n",
    b"#!/bin/sh\x0bx\nexit 3\n", b"#!" + b" " * 253 + b"\n", b"#!" + b" " * 254, b"#!" + b" " * 300 + b"/bin/sh\n",
    b"#!" + b" " * 240 + b"/bin/sh\nexit 3\n", b"#!" + b" " * 246 + b"/bin/sh\nexit 3\n",
    b"#!" + b" " * 247 + b"/bin/sh\nexit 3\n", b"#!" + b" " * 245 + b"/bin/sh -e\n",
    b"#!" + b" " * 248 + b"/bin/sh\nexit 3\n", b"#!/bin/sh" + b" " * 300 + b"\nexit 3\n",
    b"#!/bin/sh " + b"a" * 300 + b"\nexit 3\n", b"#!/" + b"a" * 252 + b"\n", b"#!/" + b"a" * 253 + b"\n",
    b"#!/" + b"a" * 254 + b"\n", b"#!/" + b"./" * 123 + b"bin/sh\nexit 3\n", b"#!" + b"/" * 246 + b"bin/sh\nexit 3\n",
    b"#!" + b"/" * 247 + b"bin/sh\nexit 3\n", b"#!" + b"/" * 248 + b"bin/sh\nexit 3\n", b"#!" + b"/" * 247 + b"bin/sh ",
    b"#!" + b"/" * 246 + b"bin/sh\0 \nexit 3\n", b"#!" + b"/" * 247 + b"bin/sh\0\n",
    b"#!/run/w/dir \n", b"#!bin/sh\n", b"#!.\n", b"#!/\n",
    b"#!\xff\xfe\n", b"#!/bin/sh\n" + b"\0" * 300, b"#!/bin/busybox false\n", b"#!/bin/busybox true\n",
    b"#!#!/bin/sh\n", b"#!/run/w/script\0\n",
]  # fmt: skip


def test_scripts(bare: Inside, hooked: Rehearsal) -> None:
    source = """
        result = []
        for number, content in enumerate(contents):
            put("subject", content)
            result.append((number, execute("/run/w/subject")))
    """
    assert_same(bare, hooked, source, contents=SHEBANGS)


EXECVEAT = {
    "path": "execveat(AT_FDCWD, b'hello')",
    "relative to a directory": "execveat(os.open('dir', os.O_RDONLY), b'hello')",
    "relative to an O_PATH directory": "execveat(os.open('dir', os.O_PATH), b'../link')",
    "relative to a file": "execveat(os.open('hello', os.O_RDONLY), b'x')",
    "relative to nothing": "execveat(99, b'x')",
    "absolute with a bad directory": "execveat(99, b'/run/w/hello')",
    "empty": "execveat(os.open('hello', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)",
    "empty, O_PATH": "execveat(os.open('hello', os.O_PATH), b'', flags=AT_EMPTY_PATH)",
    "empty without the flag": "execveat(os.open('hello', os.O_RDONLY), b'')",
    "empty, not open": "execveat(99, b'', flags=AT_EMPTY_PATH)",
    "empty, the working directory": "execveat(AT_FDCWD, b'', flags=AT_EMPTY_PATH)",
    "empty flag with a path": "execveat(AT_FDCWD, b'hello', flags=AT_EMPTY_PATH)",
    "empty, a link": "execveat(os.open('link', os.O_PATH | os.O_NOFOLLOW), b'', flags=AT_EMPTY_PATH)",
    "a link, not to be followed": "execveat(AT_FDCWD, b'link', flags=0x100)",
    "no link, not to be followed": "execveat(AT_FDCWD, b'dirlink/hello', flags=0x100)",
    "own program, not to be followed": "execveat(AT_FDCWD, b'/proc/self/exe', flags=0x100)",
    "a flag that none knows": "execveat(AT_FDCWD, b'hello', flags=0x40000000)",
    "a bad flag and a bad path": "execveat(AT_FDCWD, b'nothing', flags=0x40000000)",
    "script by descriptor": "execveat(inheritable('script'), b'', flags=AT_EMPTY_PATH)",
    "script by close-on-exec descriptor": "execveat(os.open('script', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)",
    "script below a close-on-exec directory": "execveat(os.open('.', os.O_RDONLY), b'script')",
    "script below a directory": "execveat(inheritable('.'), b'script')",
    "nested script by close-on-exec descriptor": "execveat(os.open('nested2', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)",
    "garbage by close-on-exec descriptor": "execveat(os.open('/t/bin/garbage', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)",
    "noexec by descriptor": "execveat(os.open('noexec/hello', os.O_RDONLY), b'', flags=AT_EMPTY_PATH)",
    "memfd": "execveat(memfd_of('hello'), b'', flags=AT_EMPTY_PATH)",
    "memfd without x": "execveat(sealed('hello'), b'', flags=AT_EMPTY_PATH)",
    "memfd script": "execveat(memfd_of('script', flags=0), b'', flags=AT_EMPTY_PATH)",
    "deleted": "execveat(deleted('hello'), b'', flags=AT_EMPTY_PATH)",
    "by /proc/self/fd": "execveat(AT_FDCWD, b'/proc/self/fd/%d' % inheritable('hello'))",
    "by /proc/thread-self/fd": "execveat(AT_FDCWD, b'/proc/thread-self/fd/%d' % os.open('hello', os.O_RDONLY))",
    "by /dev/fd": "execveat(AT_FDCWD, b'/dev/fd/%d' % os.open('hello', os.O_RDONLY))",
    "script by /dev/fd": "execveat(AT_FDCWD, b'/dev/fd/%d' % inheritable('script'))",
    "memfd by /proc/self/fd": "execveat(AT_FDCWD, b'/proc/self/fd/%d' % memfd_of('hello'))",
    "deleted by /proc/self/fd": "execveat(AT_FDCWD, b'/proc/self/fd/%d' % deleted('hello'))",
    "a socket by /proc/self/fd": "execveat(AT_FDCWD, b'/proc/self/fd/%d' % socket.socket().fileno())",
    "a pipe": "execveat(os.pipe()[0], b'', flags=AT_EMPTY_PATH)",
    "a bad pointer": "call('execve', 8, None, None)",
    "a null pointer": "call('execve', None, None, None)",
    "a kernel pointer": "call('execve', -4096, None, None)",
    "a directory link by /proc/self/cwd": "execveat(AT_FDCWD, b'/proc/self/cwd/dirlink/../winding')",
    "from a deleted directory": "gone(); execveat(AT_FDCWD, b'hello')",
    "upwards from a deleted directory": "gone(); execveat(AT_FDCWD, b'../hello')",
    "own pid": "execveat(AT_FDCWD, b'/proc/%d/cwd/hello' % os.getpid())",
    "in another root": "os.chroot('jail'); execveat(AT_FDCWD, b'/link')",
    "in another root, upwards": "os.chroot('jail'); execveat(AT_FDCWD, b'/up')",
    "in another root, a script": "os.chroot('jail'); execveat(AT_FDCWD, b'/script')",
    "from outside another root": "os.chroot('jail'); execveat(AT_FDCWD, b'../w/hello')",
    "descriptor from outside another root": "fd = os.open('dir', 0); os.chroot('jail'); execveat(fd, b'../../w/hello')",
    "in another mount namespace": "covered(); execveat(AT_FDCWD, b'/run/w/dir/hello')",
    "beneath a mount": "fd = os.open('dir', 0); covered(); execveat(fd, b'hello')",
    "open for writing": "w = os.open('hello', os.O_WRONLY); execveat(AT_FDCWD, b'hello')",
    "a script open for writing": "w = os.open('script', os.O_WRONLY); execveat(AT_FDCWD, b'script')",
    "an interpreter open for writing": "w = os.open('script', os.O_WRONLY); execveat(AT_FDCWD, b'nested1')",
    "an ELF interpreter open for writing": "w = os.open('plain', os.O_WRONLY); execveat(AT_FDCWD, b'interp_relative')",
    "a memfd reopened for writing": "fd = memfd_of('hello'); w = os.open('/proc/self/fd/%d' % fd, os.O_RDWR);"
    " execveat(fd, b'', flags=AT_EMPTY_PATH)",
    "ignored SIGSEGV": "signal.signal(signal.SIGSEGV, signal.SIG_IGN); execveat(AT_FDCWD, b'hello')",
}

HELPERS = """
    def inheritable(name):
        fd = os.open(name, os.O_RDONLY)
        os.set_inheritable(fd, True)
        return fd
    def deleted(name):
        Path("doomed").write_bytes(Path(name).read_bytes())
        os.chmod("doomed", 0o755)
        fd = inheritable("doomed")
        os.unlink("doomed")
        return fd
    def sealed(name):
        fd = memfd_of(name)
        os.fchmod(fd, 0o644)
        return fd
    def gone():
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("/run/w/gone")
    def covered():
        call("unshare", CLONE_NEWNS)
        call("mount", b"x", b"/run/w/dir", b"tmpfs", 0, None)
    def detached():
        call("unshare", CLONE_NEWNS)
        call("mount", b"x", b"/run/w/dir", b"tmpfs", 0, None)
        Path("/run/w/dir/hello").write_bytes(Path("/run/w/hello").read_bytes())
        os.chmod("/run/w/dir/hello", 0o755)
        fd = os.open("/run/w/dir", 0)
        call("umount2", b"/run/w/dir", MNT_DETACH)
        return fd
    def detached_copy():
        call("unshare", CLONE_NEWNS)
        call("mount", b"/run/w", b"/run/w/dir", None, MS_BIND, None)
        fd = os.open("/run/w/dir", 0)
        call("umount2", b"/run/w/dir", MNT_DETACH)
        return fd
"""


@pytest.mark.parametrize("case", EXECVEAT)
def test_execveat(bare: Inside, hooked: Rehearsal, case: str) -> None:
    source = HELPERS + "\n    result = run(lambda: exec(code, globals() | locals()))"
    assert_same(bare, hooked, source, code=EXECVEAT[case])


@pytest.mark.parametrize("mount", ["detached", "detached_copy"])
def test_a_mount_that_nobody_can_name_is_not_judged(hooked: Rehearsal, mount: str) -> None:
    hooked.policy("")
    source = HELPERS + f"\n    result = run(lambda: execveat({mount}(), b'hello'))"
    assert hooked.run(source) == {"error": "EPERM"}
    assert [call for call, _ in hooked.notes.unjudged] == ["execveat"]


def test_a_mapped_file_that_was_deleted(bare: Inside, hooked: Rehearsal) -> None:
    """Only an authority over the whole machine leads from a mapping to its file; without it, it is not judged."""
    source = (
        HELPERS + "\n    a = mmap_(4096, 1, 2, deleted('hello'))\n    result = outcome(lambda: mprotect(a, 4096, 5))"
    )
    if os.geteuid() == 0:
        assert_same(bare, hooked, source)
    else:
        hooked.policy("")
        assert hooked.run(source) == {"error": "EPERM"}
        assert "no longer found" in hooked.notes.unjudged[0][1]


MAPPINGS = {
    "not open": "mmap_(4096, 4, 2, 99)",
    "O_PATH": "mmap_(4096, 4, 2, os.open('hello', os.O_PATH))",
    "no length": "mmap_(0, 4, 2, os.open('hello', os.O_RDONLY))",
    "write only": "mmap_(4096, 5, 2, os.open('zero', os.O_WRONLY))",
    "shared for writing": "mmap_(4096, 7, 1, os.open('hello', os.O_RDONLY))",
    "a directory": "mmap_(4096, 5, 2, os.open('dir', os.O_RDONLY))",
    "a pipe": "mmap_(4096, 5, 2, os.pipe()[0])",
    "a socket": "mmap_(4096, 5, 2, socket.socket().fileno())",
    "/dev/zero": "mmap_(4096, 5, 2, os.open('/dev/zero', os.O_RDONLY))",
    "on noexec": "mmap_(4096, 5, 2, os.open('noexec/hello', os.O_RDONLY))",
    "memfd": "mmap_(4096, 5, 1, memfd_of('hello'))",
    "deleted": "mmap_(4096, 5, 1, deleted('hello'))",
    "anonymous and shared": "mmap_(4096, 5, 0x21, -1)",
    "neither shared nor private": "mmap_(4096, 5, 0x20, -1)",
    "mprotect of nothing": "mprotect(0, 4096, 5)",
    "mprotect across a hole": "a = hole(); mprotect(a, 3 * 4096, 5)",
    "mprotect before a hole": "a = hole(); mprotect(a, 4096, 5)",
    "mprotect into a hole": "a = hole(); mprotect(a + 4096, 2 * 4096, 5)",
    "mprotect not aligned": "a = hole(); mprotect(a + 1, 4096, 5)",
    "mprotect of no length": "mprotect(4096, 0, 5)",
    "mprotect of a part of a page": "a = hole(); mprotect(a, 1, 5)",
    "mprotect with an unknown bit": "a = hole(); mprotect(a, 4096, 0x105)",
    "mprotect growing both ways": "a = hole(); mprotect(a, 4096, 0x03000004)",
    "mprotect growing down": "a = hole(); mprotect(a, 4096, 0x01000005)",
    "mprotect growing up": "a = hole(); mprotect(a, 4096, 0x02000005)",
    "mprotect growing down in a hole": "a = hole(); mprotect(a + 4096, 4096, 0x01000005)",
    "mprotect growing down from a hole": "a = hole(); mprotect(a + 4096, 8192, 0x01000005)",
    "mprotect of a growing mapping": "a = mmap_(8192, 3, 0x122, -1); mprotect(a + 4096, 4096, 0x01000005)",
    "mprotect of no length with unknown bits": "mprotect(4096, 0, 0x115)",
    "mprotect of no length, not aligned": "mprotect(4097, 0, 5)",
    "mprotect over the end with unknown bits": "mprotect(2**63, 2**63, 0x115)",
    "mprotect of nothing with unknown bits": "mprotect(0, 4096, 0x115)",
    "mprotect with BTI": "a = hole(); mprotect(a, 4096, 0x15)",
    "mprotect with MTE": "a = hole(); mprotect(a, 4096, 0x25)",
    "mprotect with SEM": "a = hole(); mprotect(a, 4096, 0xd)",
    "mprotect on noexec": "a = mmap_(4096, 1, 2, os.open('noexec/hello', os.O_RDONLY)); mprotect(a, 4096, 5)",
    "mprotect of a shared mapping that may not be written": (
        "a = mmap_(4096, 1, 1, os.open('hello', os.O_RDONLY)); mprotect(a, 4096, 7)"
    ),
    "mprotect of the kernel's own": "a = own(b'[vvar]'); mprotect(a, 4096, 5)",
    "mprotect of everything": "mprotect(4096, 2**64 - 8192, 5)",
    "mprotect over the end": "mprotect(2**63, 2**63, 5)",
    "mprotect of a file": "mprotect(map_memory('hello', 'r'), 4096, 5)",
    "mprotect of a memfd": "a = mmap_(4096, 1, 1, memfd_of('hello')); mprotect(a, 4096, 5)",
    "mprotect of shared memory": "a = mmap_(4096, 3, 0x21, -1); mprotect(a, 4096, 5)",
    "mprotect of a pipe's end": "mprotect(2**47 - 4096, 4096, 5)",
    "pkey_mprotect": "a = hole(); call('pkey_mprotect', a, 4096, 5, -1)",
    "personality asked": "assert call('personality', 0xFFFFFFFF) == 0",
    "personality set": "call('personality', 8)",
    "remap_file_pages": "a = mmap_(8192, 3, 1, memfd_of('hello')); call('remap_file_pages', a, 4096, 0, 1, 0)",
    "executable remap_file_pages": "call('remap_file_pages', mmap_(8192, 7, 1, memfd_of('hello')), 4096, 0, 1, 0)",
    "uselib": "call('uselib', b'hello')",
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_mappings(bare: Inside, hooked: Rehearsal, case: str) -> None:
    more = """
    def hole():
        address = mmap_(3 * 4096, 3, 0x22, -1)
        call("munmap", address + 4096, 4096)
        return address
    def own(name):
        line = next(line for line in Path("/proc/self/maps").read_bytes().splitlines() if line.endswith(name))
        return int(line.split(b"-")[0], 16)
"""
    source = HELPERS + more + "\n    result = run(lambda: exec(code, globals() | locals()))"
    assert_same(bare, hooked, source, code=MAPPINGS[case])
