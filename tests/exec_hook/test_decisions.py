"""Recorded decisions of two kernels, replayed record for record: what needs only the initramfs and a tmpfs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.integrity.facts import Facts
from tests import vectors
from tests.exec_hook.tracee_harness import Rehearsal

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

# The recorded initramfs is a rootfs, ours a ramfs. All else is compared as it is, the recorder's name too.
_NUMBERS = re.compile(r"\b(pid|ino)=\d+")

#: How a step is done inside; each leaves the recorder's kind of answer in ``result``.
STEPS = {
    "execve": """
        result = execute(*args)
        if "error" in result:
            result["at"] = "exec"
    """,
    "mmap": "result = outcome(lambda: map_memory(*args))",
    "mmap then mprotect": """
        path, before, after = args
        mapped = outcome(lambda: globals().__setitem__("address", map_memory(path, before)))
        result = mapped | {"at": "map"} if "error" in mapped else outcome(
            lambda: mprotect(address, 4096, protection(after)))
    """,
    "execveat of a memfd copy": """
        fd = memfd_of(args[0])
        result = run(lambda: execveat(fd, b"", b"m", flags=AT_EMPTY_PATH))
        os.close(fd)
        result = {"ok": result["exit"]} if "exit" in result else result
    """,
    "execveat AT_EXECVE_CHECK": """
        result = outcome(lambda: execveat(AT_FDCWD, args[0].encode(), flags=AT_EXECVE_CHECK))
    """,
    "finit_module": """
        fd = os.open(args[0], os.O_RDONLY)
        result = outcome(lambda: call("finit_module", fd, b"", 0))
        os.close(fd)
    """,
    "init_module": """
        module = Path(args[0]).read_bytes()
        result = outcome(lambda: call("init_module", module, len(module), b""))
    """,
    "kexec_file_load": """
        kernel, initrd = (os.open(path, os.O_RDONLY) for path in args)
        result = outcome(lambda: call("kexec_file_load", kernel, initrd, 0, None, 0))
        os.close(kernel)
        os.close(initrd)
    """,
    "write path to ima/policy": """
        node, path = args
        fd = os.open(node, os.O_WRONLY)
        result = {"ok": 0}
        outcome_of_write = outcome(lambda: result.update(ok=os.write(fd, path.encode())))
        result = result if "ok" in outcome_of_write else outcome_of_write
        os.close(fd)
    """,
}

#: What needs the emulated securityfs as well (test_decisions_volumes).
ON_NODES = "write path to ima/policy"


def steps(kernel: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rules of each policy, and its steps."""
    rules = ""
    group: list[dict[str, Any]] = []
    for line in vectors.load(kernel, "integrity-decisions"):
        if "rules" in line:
            if group:
                yield rules, group
            rules, group = line["rules"], []
        elif "/mnt/" not in json.dumps([line["args"], line["audit"]]) and line["op"] != ON_NODES:
            group.append(line)
    yield rules, group


def normalised(text: str) -> str:
    return _NUMBERS.sub(r"\1=*", text).replace('dev="ramfs"', 'dev="rootfs"')


@pytest.mark.parametrize("entered", ["pivot_root", "chroot"])
@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_recorded_decisions(kernel: str, entered: str, tree: Path, tmp_path: Path) -> None:
    count = 0
    with Rehearsal(tmp_path / "root", tree, chroot=entered == "chroot") as rehearsal:
        rehearsal.facts.devices[rehearsal.device_of("/t")] = Facts(boot_verified=True)
        for rules, group in steps(kernel):
            for step in group:
                rehearsal.policy(rules, kernel=kernel, enforce=step["enforce"])
                result = rehearsal.run(STEPS[step["op"]], args=step["args"])
                got = [(record.type, normalised(record.text.decode())) for record in rehearsal.records]
                want = [(record["type"], normalised(record["text"])) for record in step["audit"]]
                assert (result, got) == (step["result"], want), (step["policy"], step["op"], step["args"])
                assert not rehearsal.notes.unjudged
                count += 1
    assert count == 382
