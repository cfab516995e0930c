"""The two parameters on the kernel command line."""

import pytest

from ipe_emu.kernel_cmdline import Parameters, parse_cmdline


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", Parameters()),
        (b"ro quiet root=/dev/vda ipe.enforcement=0 xipe.enforce=0 enforce=0", Parameters()),
        (b"ipe.enforce=0", Parameters(enforce=False)),
        (b"ipe.enforce=0 ipe.enforce=1", Parameters(enforce=True)),
        (b"ipe.enforce=off ipe.success_audit=on", Parameters(enforce=False, success_audit=True)),
        (b"ipe.success-audit=Yes", Parameters(success_audit=True)),
        (b"ipe.success_audit", Parameters(success_audit=True)),
        (b"ipe.enforce=0 -- ipe.enforce=1", Parameters(enforce=False)),
        (b'ipe.enforce="0"', Parameters(enforce=False)),
        (b'"ipe.enforce=0"', Parameters(enforce=False)),
        (b'dyndbg="file a.c +p; ipe.enforce=0"', Parameters()),
        (b'dyndbg="never closed ipe.enforce=0', Parameters()),
        (b"\tipe.enforce=0\n", Parameters(enforce=False)),
        (b"a\xa0ipe.enforce=0", Parameters(enforce=False)),  # the kernel's isspace() goes by Latin-1
        (b"ipe.enforce=", Parameters(ignored=(b"ipe.enforce=",))),
        (b"ipe.enforce=maybe", Parameters(ignored=(b"ipe.enforce=maybe",))),
        (b"ipe.enforce=0 ipe.enforce=maybe", Parameters(enforce=False, ignored=(b"ipe.enforce=maybe",))),
        (b"=ipe.enforce=0 \xff", Parameters()),
        (b"dm-verity.keyring-unsealed=1", Parameters(dm_verity_keyring_unsealed=True)),
        (b"dm_verity.require_signatures", Parameters(dm_verity_require_signatures=True)),
        (b"gpt quiet", Parameters(force_gpt=True)),
        (b"gpt=1 -- gpt", Parameters()),
    ],
)
def test_parse_cmdline(text: bytes, expected: Parameters) -> None:
    assert parse_cmdline(text) == expected
