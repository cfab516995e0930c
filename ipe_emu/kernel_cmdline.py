"""The kernel command line: its words, and the parameters that change what the emulated kernel answers."""

from collections.abc import Iterator

from attrs import frozen

from ipe_emu.errors import KernelError
from ipe_emu.lsm import kstrtobool

#: isspace() of the kernel, which goes by Latin-1.
_SPACE = b" \t\n\v\f\r\xa0"


@frozen
class Parameters:
    """What the command line says; ``ignored`` are the words that the kernel only complains about."""

    enforce: bool = True
    success_audit: bool = False
    dm_verity_keyring_unsealed: bool = False
    dm_verity_require_signatures: bool = False
    force_gpt: bool = False
    ignored: tuple[bytes, ...] = ()


def parse_cmdline(text: bytes) -> Parameters:
    """Read the parameters that `Parameters` has (kernel: ``parse_args()``, ``param_set_bool()``).

    The last boolean counts. A value that is no boolean is ``ignored``: the kernel logs an error and goes on with what
    it had. Every other word belongs to somebody else. ``--`` ends what the kernel reads.
    """
    values = {
        b"ipe.enforce": True,
        b"ipe.success_audit": False,
        b"dm_verity.keyring_unsealed": False,
        b"dm_verity.require_signatures": False,
    }
    force_gpt = False
    ignored = []
    for word in words(text):
        if word == b"--":
            break
        force_gpt |= word == b"gpt"
        name, equals, value = word.partition(b"=")
        name = name.replace(b"-", b"_")  # parameq() takes them for the same
        if name not in values:
            continue
        if value[:1] == b'"':
            value = value[1:].removesuffix(b'"')
        try:
            values[name] = kstrtobool(value) if equals else True  # a bare name sets it
        except KernelError:
            ignored.append(word)
    enforce, success_audit, unsealed, signed = values.values()
    return Parameters(enforce, success_audit, unsealed, signed, force_gpt, tuple(ignored))


def words(text: bytes) -> Iterator[bytes]:
    """Cut a command line at white space outside double quotes (``next_arg()``).

    Quotes around a whole word are no part of it.
    """
    word = bytearray()
    quoted = False
    for octet in text + b" ":
        if octet in _SPACE and not quoted:
            if word:
                yield bytes(word[1:].removesuffix(b'"') if word[0] == ord('"') else word)
            word.clear()
            continue
        quoted ^= octet == ord('"')
        word.append(octet)
    if word:  # a quote was never closed: the word goes on to the end
        yield bytes(word.removeprefix(b'"').removesuffix(b" "))
