"""Scripts and ELF headers as values."""

import pytest

from ipe_emu.binfmt import elf, script


def head(text: bytes) -> bytes:
    return text[: script.BUFFER_SIZE].ljust(script.BUFFER_SIZE, b"\0")


@pytest.mark.parametrize(
    ("text", "interpreter"),
    [
        (b"#!/bin/sh\n", b"/bin/sh"),
        (b"#! \t /bin/sh \t -x\n", b"/bin/sh"),
        (b"#!/bin/sh", b"/bin/sh"),
        (b"#!/bin/sh\r\n", b"/bin/sh\r"),
        (b"#!\n", None),
        (b"#! \t\n", None),
        (b"#!", b""),  # a NUL ends it: the empty name, which the kernel opens as a directory
        (b"#!/" + b"a" * 251 + b"\n", b"/" + b"a" * 251),
        (b"#!/" + b"a" * 253 + b"\n", None),  # the newline is out of sight
        (b"#!/" + b"a" * 252 + b" ", b"/" + b"a" * 252),
        (b"#!/" + b"a" * 300, None),
        (b"#!" + b" " * 300, None),
    ],
)
def test_interpreters(text: bytes, interpreter: bytes | None) -> None:
    assert script.is_script(head(text))
    assert script.interpreter_of(head(text)) == interpreter


@pytest.mark.parametrize("text", [b"", b"\x7fELF", b"\x7fELF" + bytes(59), b"MZ" + bytes(100), bytes(64)])
def test_no_elf(text: bytes) -> None:
    assert elf.kind_of(text) is elf.Kind.NOT_ELF
    assert not elf.module_name(lambda offset, size: text[offset : offset + size], len(text))
