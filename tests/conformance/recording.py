"""Recorded sequences: those that once showed a difference, with what each kernel answered.

tests/vectors/sequences.jsonl says what is done and why; linux-*/sequences.jsonl.xz holds the answers. The older
recordings can be put to a kernel again: the same steps, in the same order, on a machine that has just booted.
"""

import base64
import json
import lzma
import os
from pathlib import Path
from typing import Any

from tests.conformance.audit import normal
from tests.conformance.compare import Answers
from tests.conformance.generate import FIRST, WAYS, Step, concrete, enforcing, reset
from tests.conformance.machines import Machine, MountedEmulator, RunningEmulator, UserModeLinux
from tests.conformance.script import script
from tests.securityfs.acting import OPEN_FLAGS, encoded
from tests.securityfs.policies import signed
from tests.vectors import HERE, load

SOURCE = HERE / "sequences.jsonl"
WALKS = tuple(f"walk-{number}" for number in range(1, 7))
REPLAYED = (*WALKS, "securityfs-operations", "policy-texts", "pkcs7-blobs")


def sequences() -> list[dict[str, Any]]:
    """The sequences: ``why``, ``way`` and ``steps``."""
    return [json.loads(line) for line in SOURCE.read_text().splitlines()]


def sequences_of(way: str) -> list[dict[str, Any]]:
    """Those of one way."""
    return [sequence for sequence in sequences() if sequence["way"] == way]


def ways() -> list[str]:
    """What there are sequences for. None is for volumes or seals, whose hashes are each machine's own."""
    return [way for way in WAYS if any(sequence["way"] == way for sequence in sequences())]


def batch(way: str) -> list[list[Step]]:
    """The sequences of one way, as machines do them; the first only brings them to a known state."""
    steps = [sequence["steps"] for sequence in sequences_of(way)]
    return [
        [reset(base, enforce=enforcing(way)), *(concrete(step, base) for step in sequence)]
        for base, sequence in enumerate([[], *steps], FIRST)
    ]


def record(kernel: UserModeLinux, provenance: dict[str, str]) -> list[dict[str, Any]]:
    """Every sequence's answers, one line for each way and sequence; the first line says where they are from."""
    lines: list[dict[str, Any]] = [provenance]
    for way in ways():
        answers = kernel.answer(batch(way))[1:]
        lines += [{"way": way, "answers": answer} for answer in answers]
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    with lzma.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def recorded(kernel: str, way: str) -> list[Answers]:
    """What a kernel answered to the sequences of one way."""
    return [line["answers"] for line in load(kernel, "sequences") if line.get("way") == way]


def emulator(profile: str, way: str) -> MountedEmulator:
    """What the sequences of one way are put to."""
    return RunningEmulator(profile) if way == "run" else MountedEmulator(profile)


def emulated(profile: str, way: str) -> list[Answers]:
    """What the emulator answers to them."""
    return emulator(profile, way).answer(batch(way))[1:]


def typed(machine: Machine, profile: str, way: str) -> list[str]:
    """Where the printed scripts of the sequences of one way do not give the recorded results on a machine."""
    differences = []
    for sequence, answers in zip(sequences_of(way), recorded(profile, way), strict=True):
        results = machine.type_in(script(sequence["steps"], FIRST + 1, enforce=enforcing(way)))
        if results != [answer["result"] for answer in answers]:
            differences.append(f"{sequence['why']}: typed in: {results}")
    return differences


# -- the older recordings --------------------------------------------------------------------------------------------

_CHANGES: dict[str, Step] = {
    "chmod": {"mode": 0o777},
    "chown": {"uid": 1000},
    "truncate": {"size": 0},
    "truncate5": {"op": "truncate", "size": 5},
}


def _as_driven(step: Step) -> Step:
    """A recorded step as the driver does it."""
    done = {key: value for key, value in step.items() if key not in ("result", "audit")}
    if step["op"] == "write":
        done["flags"] = OPEN_FLAGS[done.pop("open")]
    return done | _CHANGES.get(step["op"], {})


def replay(kernel: UserModeLinux, profile: str, name: str) -> tuple[int, list[str]]:
    """Put a recorded file to a kernel; how many steps were compared, and what differs from the recording."""
    rows = [row for row in load(profile, name) if row.get("op") != "shell" and row.get("blob") != ""]
    if name == "policy-texts":
        steps = [{"op": "load", "data": encoded(signed(base64.b64decode(row["text"])))["data"]} for row in rows]
    elif name == "pkcs7-blobs":
        rows = [row for row in rows if row["blob"] is not None]  # some were too large to be listed
        steps = [{"op": "load", "data": row["blob"]} for row in rows]
    else:
        steps = [_as_driven(row) for row in rows]
    # A kernel is permissive until the driver runs, for that is no program of the initramfs.
    start: Step = {"op": "write", "path": "ipe/enforce", "flags": os.O_WRONLY, "writes": [encoded(b"1")["data"]]}
    answers = kernel.answer([[start], steps])[1]
    differences = []
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
        got, wanted = [answer["result"]], [row["result"]]
        if steps[number - 1]["op"] == "load":
            got = [_part(answer["result"], row["result"]), answer["result"].get("name")]
            wanted.append(row["policy"] if "policy" in row else row["result"].get("name"))
        if "audit" in row:
            got.append(answer["audit"])
            wanted.append([[record["type"], normal(record["text"])] for record in row["audit"]])
        if got != wanted:
            differences.append(f"{name} {number} {row.get('op', '')}: {got}, recorded {wanted}")
    return len(rows), differences


def _part(answer: Step, like: Step) -> Step:
    """What a recording of loads says of one: the error, or else the length or the name and version."""
    return {key: answer[key] for key in answer if key == "error" or key in like}
