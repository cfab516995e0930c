"""Put the recorded answers to a real mount and print every difference; the program behind test_recorded_answers.py.

usage: python -m tests.securityfs.replaying KERNEL NAME     (as root, in a mount namespace of its own)

Left out, because FUSE answers them itself: zero-length writes, and lseek (ESPIPE on securityfs).
"""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.securityfs import acting
from tests.securityfs.acting import Actor, Step, failed
from tests.securityfs.emulator import Emulator, environment, mounted
from tests.securityfs.identities import become
from tests.securityfs.policies import signed
from tests.vectors import load

TYPES = {"MAC_STATUS": 1404, "IPE_ACCESS": 1420, "IPE_CONFIG_CHANGE": 1421, "IPE_POLICY_LOAD": 1422}
#: What depends on the machine that recorded: everything else must be equal.
MACHINE_S_OWN = re.compile(r'\b(pid|ino|auid|ses)=\d+|\b(comm|dev|path)=("[^"]*"|\w+)')


class Recorder(Actor):
    """Does steps as whom they were recorded."""

    def perform(self, step: Step) -> Any:
        """Do a step as whom it was recorded: in a child that gives up what the recorder gave up."""
        who = step.get("as", "root")
        if who == "root":
            return self.act(step)
        if who == "root, program on tmpfs":
            return from_other_program(self.root, step)
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                become(who)
                os.write(writable, json.dumps(self.act(step)).encode())
            finally:
                os._exit(0)
        os.close(writable)
        with open(readable, "rb") as stream:  # noqa: PTH123 - a descriptor
            said = stream.read()
        os.waitpid(child, 0)
        return json.loads(said)


def normal(text: str) -> str:
    return MACHINE_S_OWN.sub(lambda found: found[0].partition("=")[0] + "=*", text).strip()


class AuditLog:
    """The records since the last look; they are out before a system call returns."""

    def __init__(self, emulator: Emulator) -> None:
        self.stream = emulator.audit_log.open("rb")

    def new(self) -> list[tuple[int, str]]:
        lines = self.stream.read().decode("utf-8", "surrogateescape").splitlines()
        return [
            (TYPES[line.removeprefix("type=").partition(" ")[0]], normal(line.partition("): ")[2])) for line in lines
        ]


def recorded_audit(step: Step) -> list[tuple[int, str]]:
    # The recorder's own executions are in the log of the recorded machine; nothing is executed under these mounts.
    records = [(record["type"], normal(record["text"])) for record in step["audit"]]
    return [record for record in records if "ipe_op=EXECUTE" not in record[1]]


def is_left_out(step: Step) -> bool:
    return (
        "files" in step
        or step["op"] == "shell"
        or "exec" in step
        or "" in step.get("writes", ())
        or step["result"] == {"error": "ESPIPE"}
    )


def walk(emulator: Emulator, steps: list[Step]) -> tuple[int, list[str]]:
    actor, log = Recorder(emulator.directory), AuditLog(emulator)
    count, differences = 0, []
    for line, step in enumerate(steps, 1):
        if is_left_out(step) or step.get("path", "").startswith("/"):
            continue
        got, wanted = actor.perform(step), step["result"]
        count += 1
        if got != wanted:
            differences.append(f"line {line}: {step['op']} {step.get('path')}: got {got}, the kernel {wanted}")
        if "audit" in step and (records := log.new()) != (expected := recorded_audit(step)):
            differences.append(f"line {line}: {step['op']}: audit: got {records}, the kernel {expected}")
    for fd in actor.descriptors.values():
        os.close(fd)
    return count, differences


def load_each(emulator: Emulator, steps: list[Step], data_of: Callable[[Step], bytes]) -> tuple[int, list[str]]:
    """Write each text or blob to new_policy on a fresh state: what was loaded is deleted again."""
    count, differences = 0, []
    for line, step in enumerate(steps, 1):
        data = data_of(step)
        if not data:
            continue
        before = emulator.names()
        try:
            fd = os.open(emulator.ipe / "new_policy", os.O_WRONLY)
            try:
                got: Step = {"ok": os.write(fd, data)}
            finally:
                os.close(fd)
        except OSError as error:
            got = failed(error)
        for name in emulator.names() - before:
            directory = emulator.policies / name
            if "text" in step:
                loaded_name = (directory / "name").read_bytes().decode("latin-1")
                got = {"name": loaded_name, "version": (directory / "version").read_text()}
            elif name != step["policy"]:
                differences.append(f"line {line}: loaded {name}, the kernel {step['policy']}")
            (directory / "delete").write_bytes(b"1")
        count += 1
        if got != step["result"]:
            fault = str(step.get("fault", step.get("text")))[:100]
            differences.append(f"line {line} ({fault}): got {got}, the kernel {step['result']}")
    return count, differences


def mount_tmpfs(directory: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", directory], check=True)


def prepare_gate(files: dict[str, str]) -> Path:
    """Lay out the files of an op-policy walk in this private mount namespace; return the facts of them."""
    mount_tmpfs("/run")
    for name, content in files.items():
        for path in (Path("/") / name, Path("/run/t") / Path(name).name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
    interpreter = os.path.realpath(sys.executable)
    other = Path("/run/probe")
    other.write_bytes(Path(interpreter).read_bytes())
    other.chmod(0o755)
    facts = Path("/run/integrity.toml")
    entries = [f'[[file]]\npath = "{path}"\nboot_verified = true\n' for path in ("/mnt/t", interpreter)]
    facts.write_text("".join(entries))
    return facts


def from_other_program(root: Path, step: Step) -> Any:
    """Do a step in a copy of this interpreter of which nothing is known."""
    program = ["/run/probe", "-S", acting.__file__, str(root), json.dumps(step)]
    env = environment() | {"PYTHONHOME": sys.base_prefix}
    done = subprocess.run(program, capture_output=True, check=True, env=env, timeout=30)
    return json.loads(done.stdout)


def main(kernel: str, name: str) -> int:
    steps: list[Step] = load(kernel, name)
    mount_tmpfs("/mnt")  # where uid 1000 can get at it
    arguments: list[str | Path] = []
    if kernel == "op-policy":
        arguments = ["--integrity", prepare_gate(steps[0]["files"])]
    with contextlib.ExitStack() as stack:
        emulator = stack.enter_context(mounted(Path("/mnt/securityfs"), *arguments, kernel=kernel))
        if name == "policy-texts":
            count, differences = load_each(emulator, steps, lambda step: signed(base64.b64decode(step["text"])))
        elif name == "pkcs7-blobs":
            count, differences = load_each(emulator, steps, lambda step: base64.b64decode(step["blob"] or ""))
        else:
            count, differences = walk(emulator, steps)
    print("\n".join(differences))
    print(f"{count} compared")
    return 1 if differences or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
