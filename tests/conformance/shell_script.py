"""Write a sequence as a shell script that a person can type into a kernel and into the emulator."""

import os
import shlex
from collections.abc import Iterator

from tests.conformance.generate import Step, concrete, reset

_HEAD = """\
#!/bin/bash
# As root. On a kernel: mount -t securityfs none /sys/kernel/security, and run it.
# Under the emulator: ipe-emu run [options] -- bash FILE, or beside a mounted one: bash FILE DIRECTORY
cd "${1:-/sys/kernel/security}" || exit
d=$(mktemp -d)
put() { printf %s "$2" | base64 -d > "$d/$1"; }
"""
_PRIVILEGES = {
    "root without CAP_MAC_ADMIN": "setpriv --inh-caps=-mac_admin --bounding-set=-mac_admin ",
    "uid 1000": "setpriv --reuid=1000 --regid=1000 --clear-groups ",
}
_ACCESS = {os.O_RDONLY: "<", os.O_WRONLY: ">>", os.O_RDWR: "<>"}


def shell_script(sequence: list[Step], base: int) -> str:
    """The script. Each write is one write(2), by dd with a block that holds all of it."""
    lines = [_HEAD]
    start = reset(base)
    lines += _put("reset", start["data"])
    lines += [
        'dd if="$d/reset" of=ipe/new_policy bs=4M status=none',
        f"echo 1 > ipe/policies/{start['name']}/active",
        "echo 1 > ipe/enforce",
    ]
    for number, step in enumerate(sequence, 1):
        lines.append(f"# {number}: {step['op']} {step.get('path', step.get('file', step.get('fd', '')))}")
        lines += _lines(concrete(step, base), number)
    return "\n".join(lines) + "\n"


def _put(name: str, data: str) -> list[str]:
    return [f"put {name} {data}"]


def _lines(step: Step, number: int) -> Iterator[str]:  # noqa: PLR0912 - a branch for each kind of step
    privileges = _PRIVILEGES.get(step.get("as", ""), "")
    if "auid" in step:
        privileges = f"env auid={step['auid']} " + privileges
        yield f"# as a process with auid {step['auid']}: (echo {step['auid']} > /proc/self/loginuid; ...)"
    node = shlex.quote(step.get("path", ""))
    match step["op"]:
        case "write":
            names = []
            for index, data in enumerate(step["writes"]):
                names.append(f"{number}.{index}")
                yield from _put(names[-1], data)
            writes = "; ".join(f"dd if=$d/{name} bs=4M status=none" for name in names)
            yield f"{privileges}bash -c 'd='$d'; {{ {writes}; }} >> {node}'   # open flags {step['flags']:#o}"
        case "read":
            yield f"{privileges}dd if={node} bs={step['chunk']} status=none | base64"
        case "pread":
            yield f"{privileges}dd if={node} bs=1 skip={step['offset']} count={step['length']} status=none | base64"
        case "list":
            yield f"{privileges}ls -a {node}"
        case "stat":
            yield f"{privileges}stat {node}"
        case "access_r" | "access_w" | "access_x" as kind:
            yield f"{privileges}test -{kind[-1]} {node}; echo $?"
        case "fd_open":
            access = _ACCESS[step["flags"] & os.O_ACCMODE]
            yield f"exec {3 + int(step['fd'])}{access}{node}   # as {step.get('as', 'root')}"
        case "fd_write" | "fd_pwrite":
            yield from _put(str(number), step["data"])
            yield f"{privileges}dd if=$d/{number} bs=4M status=none >&{3 + int(step['fd'])}"
        case "fd_read" | "fd_pread":
            yield f"{privileges}dd bs={step['length']} count=1 status=none <&{3 + int(step['fd'])} | base64"
        case "fd_close":
            yield f"exec {3 + int(step['fd'])}>&-"
        case "shell":
            for name, data in step.get("files", {}).items():
                yield from _put(name, data)
            yield f"(cd ipe; S=$d {shlex.join([*step['shell'], step['script']])})"
        case "execve":
            name = shlex.quote(step.get("argv", [step["file"]])[0])
            yield f"{privileges}bash -c 'exec -a {name} {shlex.quote(step['file'])}'; echo $?"
        case _:
            yield f"{privileges}true   # { ({key: value for key, value in step.items() if key != 'data'}) }"
