"""``#!`` lines as the kernel reads them (fs/binfmt_script.c: ``load_script()``)."""

from typing import Final

#: How much of a file the kernel looks at to find out what it is (BINPRM_BUF_SIZE).
BUFFER_SIZE: Final = 256

_BLANKS: Final = b" \t"


def is_script(head: bytes) -> bool:
    """Whether a file that begins so is handled as a script at all."""
    return head.startswith(b"#!")


def interpreter_of(head: bytes) -> bytes | None:
    """Return the path of the interpreter that the first line names; None where the kernel answers ENOEXEC.

    ``head`` is the beginning of the file, BUFFER_SIZE bytes, padded with NUL if the file is shorter.
    """
    # strnchr() stops at a NUL, so that a newline behind one is not seen.
    newline = head.partition(b"\0")[0].find(b"\n")
    if newline >= 0:
        line = head[2:newline]
    else:
        # Without a newline the name could be cut off, unless a blank or NUL ends it within the buffer. The buffer's
        # last byte can end a name but is never part of one.
        begin = _skip_blanks(head, 2)
        if begin == len(head) or not any(byte in b" \t\0" for byte in head[begin:]):
            return None
        line = head[2:-1]
    line = line.rstrip(_BLANKS)
    name = line[_skip_blanks(line, 0) :]
    if not name:
        return None
    end = next((at for at, byte in enumerate(name) if byte in b" \t\0"), len(name))
    return name[:end]


def _skip_blanks(text: bytes, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at
