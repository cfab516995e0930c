"""Modules and kexec: the questions, the capabilities before them, and that nothing is ever loaded."""

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
MODULE = '__attribute__((section(".gnu.linkonce.this_module"))) char this_module[64] = "x";\n'
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
    assert inside.run("result = outcome(lambda: call('init_module', m, len(m), b''))", m=module) == {"ok": 0}
    assert inside.asked() == ["KERNEL_READ /run/subject", "KERNEL_LOAD ?"]
    assert [call for call, _ in inside.notes.undone] == ["finit_module", "init_module"]
    assert not inside.notes.unjudged


FAULTS: dict[str, tuple[Any, int, str]] = {
    "empty": (lambda m: b"", 0, "EINVAL"),
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
