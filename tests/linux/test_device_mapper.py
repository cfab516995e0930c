"""Answers of device-mapper as they were recorded, and this machine's, if it has one."""

import base64
import os
import struct

import pytest

from ipe_emu.linux import device_mapper
from ipe_emu.linux.device_mapper import Target, parse_table
from ipe_emu.linux.verity_state import VerityState
from tests import vectors

LINES = [line for kernel in vectors.KERNELS for line in vectors.load(kernel, "device-mapper")]


def recorded(line: dict[str, str]) -> bytes:
    return base64.b64decode(line["answer"]) + bytes(100)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["device"])
def test_tables_are_what_dmsetup_says(line: dict[str, str]) -> None:
    assert parse_table(recorded(line)) == (Target(*line["dmsetup"].split(" ", 3)[2:]),)


@pytest.mark.parametrize("at", [12, 16, 20, 28, 312 + 20])
def test_an_answer_that_lies_about_its_sizes_is_no_crash(at: int) -> None:
    """The device-mapper of a kernel does not; whoever stands in its place could."""
    for value in (0, 1, 311, 455, 1 << 16, (1 << 32) - 1):
        answer = bytearray(recorded(LINES[0]))
        struct.pack_into("=I", answer, at, value)
        try:
            targets = parse_table(bytes(answer))
        except OSError:
            continue
        assert all(isinstance(target, Target) for target in targets)
        assert len(targets) < 500


@pytest.mark.needs("device-mapper", "root")
def test_a_device_that_does_not_exist() -> None:
    major = device_mapper._major()
    assert major is not None
    with pytest.raises(OSError, match="No such device"):
        device_mapper.table(os.makedev(int(major), 255))


def test_other_devices_are_not_device_mappers() -> None:
    state = VerityState()
    assert state.verity_table("0:57") is None
    assert state.verity_table("1:0") is None
    assert state.verity_table("1:1") is None
