"""Modules and kexec: the questions, the capabilities before them, and that nothing is ever loaded."""

import errno
import fcntl
import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.integrity.facts import Facts
from tests.exec_hook.tracee_harness import Rehearsal, compile_c

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

ALLOW_ALL = "DEFAULT action=ALLOW\n"
NO_MODULES = "DEFAULT action=ALLOW\nDEFAULT op=KMODULE action=DENY\nop=KMODULE boot_verified=TRUE action=ALLOW\n"
NO_KEXEC = (
    "DEFAULT action=ALLOW\nDEFAULT op=KEXEC_IMAGE action=DENY\nDEFAULT op=KEXEC_INITRAMFS action=DENY\n"
    "op=KEXEC_IMAGE boot_verified=TRUE action=ALLOW\n"
)
COMPRESSED = 4

# What makes an object a module: a section of this name.
MODULE = (
    'struct { char list[24], name[56]; } this_module __attribute__((section(".gnu.linkonce.this_module")))'
    ' = { "", "x" };\n'
)
# The beginning of a bzImage: the boot flag, and the magic of the setup header.
KERNEL = bytes(0x1FE) + b"\x55\xaa" + bytes(2) + b"HdrS" + bytes(0x400)


@pytest.fixture
def inside(tree: Path, tmp_path: Path) -> Iterator[Rehearsal]:
    with Rehearsal(tmp_path / "root", tree) as rehearsal:
        rehearsal.facts.devices[rehearsal.device_of("/t")] = Facts(boot_verified=True)
        yield rehearsal


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compile_c(MODULE, tmp_path_factory.mktemp("module") / "m.ko", "-c").read_bytes()


FINIT = """
    put("/run/subject", content, 0o644)
    fd = os.open("/run/subject", os.O_RDONLY)
    result = outcome(lambda: call("finit_module", fd, b"", flags))
    os.close(fd)
"""


def test_a_module_is_allowed_and_not_loaded(inside: Rehearsal, module: bytes) -> None:
    inside.policy(ALLOW_ALL)
    assert inside.run(FINIT, content=module, flags=0) == {"ok": 0}
    assert inside.run("result = outcome(lambda: call('delete_module', b'x', 0))") == {"ok": 0}
    assert inside.run("result = outcome(lambda: call('init_module', m, len(m), b''))", m=module) == {"ok": 0}
    assert inside.asked() == ["KERNEL_READ /run/subject", "KERNEL_LOAD ?"]
    assert [call for call, _ in inside.notes.undone] == ["finit_module", "init_module"]
    assert not inside.notes.unjudged


FAULTS: dict[str, tuple[Any, int, str]] = {
    "truncated": (lambda m: m[:-100], 0, "ENOEXEC"),
    "header only": (lambda m: m[:64], 0, "ENOEXEC"),
    "an object": (lambda m: m.replace(b"this_module", b"that_module"), 0, "ENOEXEC"),
    "another machine": (lambda m: m[:18] + b"\x08\x00" + m[20:], 0, "ENOEXEC"),
    "a compressed one without the flag": (gzip.compress, 0, "ENOEXEC"),
    "a plain one with the flag": (lambda m: m, COMPRESSED, "EINVAL"),
    "compressed garbage": (lambda m: gzip.compress(b"x" * 100), COMPRESSED, "ENOEXEC"),
    "broken compression": (lambda m: gzip.compress(m)[:20] + b"\xff" * 40, COMPRESSED, "EINVAL"),
    "broken xz": (lambda m: lzma.compress(m, check=lzma.CHECK_CRC32)[:40] + b"\xff" * 40, COMPRESSED, "EINVAL"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_no_module_fails_after_the_question(inside: Rehearsal, module: bytes, case: str) -> None:
    make, flags, error = FAULTS[case]
    inside.policy(ALLOW_ALL)
    assert inside.run(FINIT, content=make(module), flags=flags) == {"error": error}
    assert inside.asked() == ["KERNEL_READ /run/subject"]
    assert not inside.notes.undone


@pytest.mark.parametrize("compress", [gzip.compress, lambda m: lzma.compress(m, check=lzma.CHECK_CRC32)])
@pytest.mark.parametrize("kernel", ["linux-6.12", "linux-7.3"])
def test_compressed_modules_are_modules(inside: Rehearsal, module: bytes, compress: Any, kernel: str) -> None:
    content = compress(module)
    inside.policy(ALLOW_ALL, kernel=kernel)
    assert inside.run(FINIT, content=content, flags=COMPRESSED) == {"ok": 0}
    inside.policy(NO_MODULES, kernel=kernel)
    assert inside.run(FINIT, content=content, flags=COMPRESSED) == {"error": "EACCES"}
    assert "ipe_op=KMODULE" in inside.texts()[0]


def test_zstd_is_not_judged(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    assert inside.run(FINIT, content=b"\x28\xb5\x2f\xfd" + bytes(100), flags=COMPRESSED) == {"error": "EPERM"}
    assert "zstd" in inside.notes.unjudged[0][1]


BEFORE_THE_QUESTION = {
    "unknown flags": ("call('finit_module', os.open('/t/mod.ko', os.O_RDONLY), b'', 8)", "EINVAL"),
    "not open": ("call('finit_module', 99, b'', 0)", "EBADF"),
    "O_PATH": ("call('finit_module', os.open('/t/mod.ko', os.O_PATH), b'', 0)", "EBADF"),
    "write only": ("call('finit_module', os.open('/run/t/mod.ko', os.O_WRONLY), b'', 0)", "EBADF"),
    "a directory": ("call('finit_module', os.open('/t', os.O_RDONLY), b'', 0)", "EINVAL"),
    "a device": ("call('finit_module', os.open('/dev/zero', os.O_RDONLY), b'', 0)", "EINVAL"),
    "empty": ("put('/run/empty', b''); call('finit_module', os.open('/run/empty', 0), b'', 0)", "EINVAL"),
    "a file of proc": ("call('finit_module', os.open('/proc/self/status', 0), b'', 0)", "EINVAL"),
    "too long": (
        "put('/run/m', b'x'); os.truncate('/run/m', 2**31); call('finit_module', os.open('/run/m', 0), b'', 0)",
        "EFBIG",
    ),
    "open for writing": ("call('finit_module', os.open('/run/t/mod.ko', os.O_RDWR), b'', 0)", "ETXTBSY"),
    "open for writing elsewhere": (
        "w = os.open('/run/t/mod.ko', os.O_WRONLY); call('finit_module', os.open('/run/t/mod.ko', 0), b'', 0)",
        "ETXTBSY",
    ),
    "empty and open for writing": (
        "call('finit_module', os.open('/run/e', os.O_RDWR | os.O_CREAT), b'', 0)",
        "ETXTBSY",
    ),
    "a kernel open for writing": (
        "call('kexec_file_load', os.open('/run/t/kernel', os.O_RDWR), -1, 0, None, 4)",
        "ETXTBSY",
    ),
    "an empty kernel": (
        "put('/run/empty', b''); call('kexec_file_load', os.open('/run/empty', 0), -1, 0, None, 4)",
        "EINVAL",
    ),
    "delete what was never loaded": ("call('delete_module', b'mod', 0)", "ENOENT"),
    "delete without a name": ("call('delete_module', b'', 0)", "ENOENT"),
    "delete a long name": ("call('delete_module', b'm' * 99, 0)", "ENOENT"),
    "delete an unreadable name": ("call('delete_module', None, 0)", "EFAULT"),
    "delete without the capability": ("without(16); call('delete_module', b'mod', 0)", "EPERM"),
    "short": ("call('init_module', b'x' * 63, 63, b'')", "ENOEXEC"),
    "unknown kexec flags": ("call('kexec_file_load', os.open('/t/kernel', 0), -1, 0, None, 0x40)", "EINVAL"),
    "no kernel": ("call('kexec_file_load', 99, -1, 0, None, 0)", "EBADF"),
    "without the capability": ("without(16); call('finit_module', os.open('/t/mod.ko', 0), b'', 0)", "EPERM"),
    "init without the capability": ("without(16); call('init_module', b'x' * 99, 99, b'')", "EPERM"),
    "kexec without the capability": ("without(22); call('kexec_load', 0, 0, None, 0)", "EPERM"),
    "kexec file without it": ("without(22); call('kexec_file_load', os.open('/t/kernel', 0), -1, 0, None, 4)", "EPERM"),
    "root of a nested user namespace": ("nested(); call('init_module', b'x' * 99, 99, b'')", "EPERM"),
}
HELPERS = """
    def without(capability):
        header = struct.pack("=Ii", 0x20080522, 0)
        data = syscalls.writable(24)
        call("capget", header, data)
        low, permitted, inheritable, *rest = struct.unpack("=6I", data.raw)
        call("capset", header, struct.pack("=6I", low & ~(1 << capability), permitted, inheritable, *rest))
    def nested():
        call("unshare", CLONE_NEWUSER)
"""


@pytest.mark.parametrize("case", BEFORE_THE_QUESTION)
def test_errors_before_the_question(inside: Rehearsal, case: str) -> None:
    code, error = BEFORE_THE_QUESTION[case]
    inside.policy(ALLOW_ALL)
    source = HELPERS + "\n    result = run(lambda: exec(code, globals() | locals()))"
    assert inside.run(source, code=code) == {"error": error}
    assert inside.records == []
    assert not inside.notes.unjudged


def test_a_module_is_loaded_once(inside: Rehearsal, module: bytes) -> None:
    inside.policy(ALLOW_ALL)
    other = module.replace(b"x" + bytes(55), b"y" + bytes(55))
    assert other != module
    source = """
        result = [outcome(function) for function in (
            lambda: call("init_module", m, len(m), b""),
            lambda: call("init_module", m, len(m), b""),
            lambda: call("init_module", other, len(other), b""),
            lambda: call("delete_module", b"x", 0),
            lambda: call("delete_module", b"x", 0),
            lambda: call("init_module", m, len(m), b""),
        )]
    """
    exists, missing, ok = {"error": "EEXIST"}, {"error": "ENOENT"}, {"ok": 0}
    assert inside.run(source, m=module, other=other) == [ok, exists, ok, ok, missing, ok]
    assert inside.asked() == ["KERNEL_LOAD ?"] * 4
    inside.policy(NO_MODULES)
    assert inside.run(source, m=module, other=other) == [{"error": "EACCES"}] * 3 + [missing] * 2 + [
        {"error": "EACCES"}
    ]


def test_a_descriptor_of_memory_may_be_open_for_writing(inside: Rehearsal, module: bytes) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        fd = os.memfd_create("m")
        os.write(fd, m)
        result = [outcome(lambda: call("finit_module", fd, b"", 0))]
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        result.append(outcome(lambda: call("finit_module", fd, b"", 0)))
    """
    assert inside.run(source, m=module) == [{"ok": 0}, {"error": "ETXTBSY"}]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EINVAL])
def test_a_writer_that_cannot_be_told_is_not_judged(
    inside: Rehearsal, module: bytes, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def no_lease(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(error, "no lease")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", no_lease)
    inside.policy(ALLOW_ALL)
    assert inside.run(FINIT, content=module, flags=0) == {"error": "EPERM"}
    assert "open for writing" in inside.notes.unjudged[0][1]


def test_an_unreadable_module_is_asked_about_first(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    assert inside.run("result = outcome(lambda: call('init_module', None, 4096, b''))") == {"error": "EFAULT"}
    assert inside.asked() == ["KERNEL_LOAD ?"]


def test_a_kernel_is_asked_about_and_then_its_initramfs(inside: Rehearsal) -> None:
    inside.policy(NO_KEXEC)
    source = """
        kernel, initrd = os.open("/t/real", os.O_RDONLY), os.open("/t/ima.pol", os.O_RDONLY)
        result = [outcome(lambda: call("kexec_file_load", kernel, initrd, 0, None, flags)) for flags in (0, 4, 1)]
    """
    inside.run("put('/t/real', content, 0o644)\nresult = 0", content=KERNEL)
    assert inside.run(source) == [{"error": "EACCES"}, {"error": "EPERM"}, {"ok": 0}]
    assert inside.asked() == ["KERNEL_READ /t/real", "KERNEL_READ /t/ima.pol", "KERNEL_READ /t/real"]
    assert ["KEXEC_IMAGE" in text for text in inside.texts()] == [True, False, True]
    assert "KEXEC_INITRAMFS" in inside.texts()[1]
    # A kernel that the policy allows is not loaded, and nothing can be said of its signature.
    assert [call for call, _ in inside.notes.unjudged] == ["kexec_file_load"]


def test_kexec_from_memory(inside: Rehearsal) -> None:
    source = """
        result = [outcome(lambda: call("kexec_load", 0, count, None, flags))
                  for count, flags in ((1, 0), (0, 0), (17, 0), (0, 0x100))]
    """
    inside.policy(NO_KEXEC)
    assert inside.run(source) == [{"error": "EACCES"}] * 4
    assert inside.asked() == ["KERNEL_LOAD ?"] * 4
    inside.policy(ALLOW_ALL)
    assert inside.run(source) == [{"error": "EPERM"}, {"ok": 0}, {"error": "EINVAL"}, {"error": "EINVAL"}]
    assert [call for call, _ in inside.notes.unjudged] == ["kexec_load"]
