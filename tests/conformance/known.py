"""The differences that the README's table lists, as far as generated sequences run into them."""

import re
from collections.abc import Callable
from typing import Any

from tests.conformance.generate import FIRST, Step
from tests.conformance.payloads import Payload, octets

#: sequence up to and with the step, field, what the emulator answered, what the kernel did: whether it is this one.
Explanation = Callable[[list[Step], str, Any, Any], bool]


def _size_of_an_open_node(sequence: list[Step], field: str, got: Any, wanted: Any) -> bool:
    """Under ``mount``: a node that somebody has open and not yet read to its end has a size (sendfile(2) needs it)."""
    step = sequence[-1]
    if step["op"] == "shell" and field == "result" and re.match(r"test -s |(busybox )?stat .*%F", step["script"]):
        node = "ipe/" + step["script"].split(";")[0].split()[-1]
        return any(other["op"] == "fd_open" and other["path"] == node for other in sequence)
    if step["op"] != "stat" or field != "result" or "size" not in got or "size" not in wanted:
        return False
    is_open = any(other["op"] == "fd_open" and other["path"] == step["path"] for other in sequence)
    return is_open and got | {"size": ""} == wanted | {"size": ""}


def _record_of_a_write_of_nothing(sequence: list[Step], field: str, got: Any, _wanted: Any) -> bool:
    """Under ``run``: no failed load is recorded where nothing was written."""
    return field == "audit" and got == [] and sequence[-1].get("payloads") == [{"literal": ""}]


def _text_under_op_policy(sequence: list[Step], field: str, got: Any, wanted: Any) -> bool:
    """Under op-policy, where no rule allows op=POLICY: text is EACCES where that is denied, with a record of it."""
    if field == "audit":
        kept = [[kind, text] for kind, text in got if "ipe_op=POLICY" not in text]
        return len(kept) == len(wanted) and all(
            mine == theirs or [mine[0], mine[1].replace("res=0 errno=-13", f"res=0 errno=-{errno}")] == theirs
            for mine, theirs in zip(kept, wanted, strict=True)
            for errno in (_errno_of(theirs[1]),)
        )
    step = sequence[-1]
    if step["op"] == "together":
        alone = [*sequence[:-1], step["each"]]
        return len(got["each"]) == len(wanted["each"]) and all(
            mine == theirs or _text_under_op_policy(alone, field, mine, theirs)
            for mine, theirs in zip(got["each"], wanted["each"], strict=True)
        )
    if isinstance(got, list):
        payloads = step.get("payloads", ({},) * len(got))
        return len(got) == len(wanted) == len(payloads) and all(
            mine == theirs or _is_refused_text(payload, mine, theirs)
            for payload, mine, theirs in zip(payloads, got, wanted, strict=True)
        )
    if "stderr" in got and "stderr" in wanted:
        return any(
            got | {"stderr": got["stderr"].replace("Permission denied", other)} == wanted
            for other in ("Bad message", "Message too long")
        )
    return _is_refused_text(step.get("payload", {}), got, wanted)


def _errno_of(record: str) -> str:
    """EBADMSG, or EMSGSIZE for what is longer than a signature can be."""
    return "90" if record.endswith("errno=-90") else "74"


def _is_refused_text(payload: Payload, got: Any, wanted: Any) -> bool:
    """Whether it is the answer to a text, as far as is known what was written; a signed policy's must be the same."""
    is_signed = bool(payload) and octets(payload, FIRST)[:1] == b"0"
    return not is_signed and got == {"error": "EACCES"} and wanted in ({"error": "EBADMSG"}, {"error": "EMSGSIZE"})


def _module_signature(sequence: list[Step], field: str, got: Any, wanted: Any) -> bool:
    """Under Secure Boot: what IPE allowed and is no module lacks a signature first, and its form is not looked at."""
    if sequence[-1]["op"] != "module" or field != "result":
        return False
    return bool(got == {"error": "ENOEXEC"} and wanted == {"error": "EKEYREJECTED"})


OP_POLICY: tuple[Explanation, ...] = (_text_under_op_policy,)
MOUNT: tuple[Explanation, ...] = (_size_of_an_open_node,)
RUN: tuple[Explanation, ...] = (_record_of_a_write_of_nothing,)
#: Where the kernel was started by firmware with Secure Boot.
SECURE_BOOT: tuple[Explanation, ...] = (_module_signature,)
