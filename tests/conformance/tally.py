"""Of what kinds steps were, and how often: a run prints it, so that a reader sees what was compared."""

import re
from collections import Counter
from collections.abc import Iterator

from tests.conformance.generate import Step
from tests.conformance.payloads import Payload

#: group and kind, and how often
Tally = Counter[tuple[str, str]]

_TOOL = re.compile(
    r"(/usr/bin/|busybox )?(cat|tee|dd|cp|wc|head|grep|ls|read|stat|touch|test|echo|printf|mv|chmod|rm)\b"
)
_BUILT_IN = ("echo", "printf", "read", "test")
#: What coreutils' cat, the one with the largest buffer, reads and writes at once is 128 KiB; busybox' tee 4 KiB.
_LARGE = 4096


def tally(sequences: list[list[Step]]) -> Tally:
    """Count the kinds of all steps."""
    return Counter(kind for sequence in sequences for step in sequence for kind in _kinds(step))


def _kinds(step: Step) -> Iterator[tuple[str, str]]:
    yield "steps", step["op"]
    yield "done by", step.get("as", "root") + (f" with auid {step['auid']}" if "auid" in step else "")
    if step["op"] == "shell":
        yield from _of_shell(step)
    if "each" in step:
        yield "several at once", f"{step['writers']} to {_node(step['each']['path'])}"
    if "path" in step:
        yield "on nodes", _node(step["path"])
    if "file" in step:
        yield "with files of", step["file"].removeprefix("/mnt/").rpartition("/")[0] or "/bin"
    for payload in (*step.get("payloads", ()), step.get("payload"), step.get("payload_file")):
        if payload is not None:
            yield "written", _of_payload(payload)


def _node(path: str) -> str:
    return re.sub(r"^ipe/policies/[^/]+", "ipe/policies/*", path)


def _of_shell(step: Step) -> Iterator[tuple[str, str]]:
    yield "shells", " ".join(step["shell"][:-1])
    tool, name = _tool(step["script"])
    origin = "busybox" if tool.startswith("busybox") else "the shell's" if name in _BUILT_IN and not tool else "GNU"
    large = step["payload_file"].get("pad", 0) > _LARGE and "$S/f" in step["script"]
    yield "tools", f"{origin} {name}" + (", a file of many writes" if large else "")


def _tool(script: str) -> tuple[str, str]:
    found = [*_TOOL.finditer(script)]
    # In `printf … "$(cat …)"` and `printf 1 | tee` it is the last that meets a node, but echo's status is no tool.
    last = found[0] if script.startswith(("echo", "test", "read", "printf '%s'")) else found[-1]
    return last[1] or "", last[2]


def _of_payload(payload: Payload) -> str:
    if "literal" in payload:
        return "a switch's value" if payload["literal"] in ("0", "1", "0\n", "1\n") else "an odd value"
    signer = payload.get("signer")
    what = f"a policy signed by {signer}" if signer else "an unsigned policy"
    return what + (", mutated" if "mutate" in payload else "") + (", long" if payload.get("pad", 0) > _LARGE else "")


def table(counted: Tally) -> str:
    """The whole as text: a line for each group, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for (group, kind), count in counted.most_common():
        groups.setdefault(group, []).append(f"{kind} {count}")
    return "\n".join(f"  {group}: {'; '.join(kinds)}" for group, kinds in groups.items())
