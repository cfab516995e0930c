import errno
import os
import struct

import pytest

from ipe_emu.linux import syscalls


def test_a_call_returns_its_result() -> None:
    assert syscalls.call("getpid") == os.getpid()


def test_a_failure_carries_errno_and_the_call_s_name() -> None:
    with pytest.raises(FileNotFoundError) as error:
        syscalls.call("openat", syscalls.AT_FDCWD, b"/nonexistent", os.O_RDONLY, 0)
    assert error.value.errno == errno.ENOENT
    assert str(error.value.strerror).startswith("openat: ")


def test_the_kernel_writes_into_a_buffer() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"hello")
        buffer = syscalls.writable(8)
        assert syscalls.call("read", reader, buffer, 8) == 5
        assert buffer.raw == b"hello\0\0\0"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_structure_may_hold_a_pointer() -> None:
    reader, writer = os.pipe()
    try:
        content = syscalls.writable(4)
        content.raw = b"abcd"
        vector = struct.pack("QQ", syscalls.address(content), 4)
        assert syscalls.call("writev", writer, vector, 1) == 4
        assert os.read(reader, 9) == b"abcd"
    finally:
        os.close(reader)
        os.close(writer)


def test_an_unknown_call_is_named() -> None:
    with pytest.raises(NotImplementedError, match="frobnicate"):
        syscalls.call("frobnicate")


def test_newer_calls_share_their_numbers() -> None:
    for name, value in syscalls.NUMBERS_X86_64.items():
        if value >= 424:
            assert syscalls.NUMBERS_AARCH64[name] == value, name


def test_numbers_are_unique() -> None:
    for table in (syscalls.NUMBERS_X86_64, syscalls.NUMBERS_AARCH64):
        assert len(set(table.values())) == len(table)


@pytest.mark.parametrize(("register", "value"), [(0xFFFFFF9C, -100), (0xFFFFFFFFFFFFFF9C, -100), (3, 3), (1 << 32, 0)])
def test_descriptors_are_c_ints(register: int, value: int) -> None:
    assert syscalls.signed_int(register) == value
