"""What writing IMA's policy node means to IPE: a path names a file, and reading it is an event of op=POLICY.

IMA itself is not emulated. Its rules are read only as far as it takes to tell whether a kernel would take them: what
is accepted here a kernel with IMA accepts, whatever its configuration. Rules that could deny something later
(``appraise``) and rules that depend on the configuration are not judged.

Source: ``ima_write_policy()`` and ``ima_read_policy()`` in security/integrity/ima/ima_fs.c, ``ima_parse_rule()`` and
``ima_validate_rule()`` in ima_policy.c.
"""

import errno
import re
import threading
from typing import Final, Protocol

from attrs import define, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.lsm import Decision, Ipe, Writer
from ipe_emu.policy.rule import Operation

#: One write carries less than a page; what is beyond is not looked at (``ima_write_policy()``).
LONGEST_WRITE: Final = 4095
#: No policy is as long; this bounds the time that judging one takes.
_LONGEST_FILE: Final = 1 << 20
#: The call, in reports.
_CALL: Final = "write to ima/policy"

#: Actions after which everything that was allowed still is.
_HARMLESS: Final = frozenset({"measure", "dont_measure", "dont_appraise", "audit", "hash", "dont_hash"})
#: Those with which every condition in ``_CONDITIONS`` may stand, in every kernel with IMA.
_FUNCTIONS: Final = (
    "FILE_CHECK|PATH_CHECK|MODULE_CHECK|FIRMWARE_CHECK|FILE_MMAP|MMAP_CHECK|BPRM_CHECK|CREDS_CHECK|KEXEC_KERNEL_CHECK"
    "|KEXEC_INITRAMFS_CHECK|POLICY_CHECK"
)
_ID: Final = re.compile(r"\d{1,9}")
#: Conditions with the values that are good everywhere, by what can stand only once (uid and euid share a place).
_CONDITIONS: Final = {
    "func": ("func", re.compile(_FUNCTIONS)),
    "mask": ("mask", re.compile(r"\^?MAY_(?:EXEC|WRITE|READ|APPEND)")),
    "fsmagic": ("fsmagic", re.compile(r"(?:0x)?[0-9a-fA-F]{1,16}")),
    "fsname": ("fsname", re.compile(r"\w+")),
    "fsuuid": ("fsuuid", re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")),
    **{name: (name.removeprefix("e"), _ID) for name in ("uid", "euid", "gid", "egid", "fowner", "fgroup")},
}
_COMPARED: Final = frozenset({"uid", "euid", "gid", "egid", "fowner", "fgroup"})
#: What other words a rule can begin with in some kernel or other: they depend on its version and configuration.
_SOME_KERNELS: Final = frozenset({
    "appraise", "dont_audit", "obj_user", "obj_role", "obj_type", "subj_user", "subj_role", "subj_type", "digest_type",
    "appraise_type", "appraise_flag", "appraise_algos", "permit_directio", "pcr", "template", "keyrings", "label",
    "fs_subtype",
})  # fmt: skip
_WORD: Final = re.compile(r"([a-z_]+)(?:([=<>])(.+))?", re.DOTALL)


class Observer(Protocol):
    """Who is told, in any thread, what the report of a rehearsal must say of IMA's policies."""

    def denied(self, subject: Subject, file: File, decision: Decision) -> None:
        """Reading a file with rules was denied."""

    def not_judged(self, subject: Subject, call: str, reason: str) -> None:
        """Whether a kernel takes these rules, or what they would deny, could not be judged: the write failed."""

    def not_done(self, subject: Subject, call: str, what: str) -> None:
        """The rules were accepted, and are not in force."""


@define(eq=False)
class ImaPolicy:
    """The node ``ima/policy``, as far as it concerns IPE. Thread-safe."""

    ipe: Ipe
    observer: Observer
    # The kernel's ima_write_mutex.
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def write(self, data: bytes, writer: Writer) -> int:
        """Write rules, or the path of a file with rules. Return how many bytes were taken, which may be fewer.

        KernelError: EACCES for a file that IPE denies, what opening or reading it fails with, and EINVAL for rules
        that no kernel takes, or of which it is not known.
        """
        text = data[:LONGEST_WRITE].partition(b"\0")[0]  # a string, to the kernel
        with self._lock:
            try:
                if text[:1] == b"/":
                    return self._read_policy(text, writer)
                return _add_rule(text, len(data), writer, self.observer)
            except NotJudgedError as error:
                self.observer.not_judged(writer.subject, _CALL, str(error))
                raise KernelError(errno.EINVAL, f"could not be judged: {error}", "ima_parse_rule") from None

    def _read_policy(self, text: bytes, writer: Writer) -> int:
        """Read a file with rules (``ima_read_policy()``)."""
        file, content = writer.read_policy_file(text.partition(b"\n")[0])
        decision = self.ipe.process_event(Operation.POLICY, Hook.KERNEL_READ, writer.subject, file)
        if decision.errno:
            self.observer.denied(writer.subject, file, decision)
            raise KernelError(
                decision.errno, "op=POLICY denies reading the file that the path names", "ipe_kernel_read_file"
            )
        rules = check_rules(content)
        self.observer.not_done(writer.subject, _CALL, _not_in_force(rules))
        return len(text)


def _add_rule(text: bytes, written: int, writer: Writer, observer: Observer) -> int:
    """Take the first line of ``written`` bytes (``ima_parse_add_rule()``); the writer is to write the rest again."""
    line = text.partition(b"\n")[0]
    taken = len(line) + 1
    if taken > written:
        # The kernel would return one more than was written, which programs take for all kinds of things.
        raise NotJudgedError("a rule without a newline at its end")
    if _check_line(line):
        observer.not_done(writer.subject, _CALL, _not_in_force(1))
    return taken


def check_rules(content: bytes) -> int:
    """Return how many rules a file holds, all of which every kernel with IMA takes.

    KernelError EINVAL where none does; NotJudgedError where that depends, or where the rules deny something later.
    """
    if len(content) > _LONGEST_FILE or b"\0" in content:
        raise NotJudgedError("a file that is no text, or too long for a policy")
    rules = sum(_check_line(line) for line in content.split(b"\n")[:-1])
    if not content.endswith(b"\n"):
        # What ima_read_policy() counts is then one more than there is.
        raise _invalid("the last line does not end with a newline")
    return rules


def _check_line(line: bytes) -> bool:
    """Return whether a line holds a rule, and not a comment or nothing; errors as ``check_rules``."""
    rule = line.decode("latin-1").lstrip(" \t")
    if not rule or rule.startswith("#"):
        return False
    parsed = []
    for word in filter(None, re.split("[ \t]", rule)):
        if word.startswith("#"):
            raise NotJudgedError("IMA is not emulated, and whether the rest is a comment depends on its version")
        found = _WORD.fullmatch(word)
        if found is None or not _is_known(found):
            raise _invalid(f"{word[:50]!r} is no word of a rule")
        if not _is_certain(found):
            raise NotJudgedError(f"IMA is not emulated, and {word[:50]!r} depends on it")
        parsed.append(found)
    names = [found[1] for found in parsed]
    actions = [name for name in names if name in _HARMLESS]
    if len(actions) != 1:
        raise _invalid(f"a rule has one action, and this one {len(actions)}")
    places = [_CONDITIONS[name][0] for name in names if name in _CONDITIONS]
    if len(set(places)) != len(places):
        raise NotJudgedError("IMA is not emulated, and a condition that stands twice depends on it")
    return True


def _is_known(found: re.Match[str]) -> bool:
    """Whether a word can stand in a rule of some kernel."""
    name, sign = found[1], found[2]
    if name in _HARMLESS:
        return sign is None
    if name in _CONDITIONS:
        return sign == "=" or (sign is not None and name in _COMPARED)
    return name in _SOME_KERNELS


def _is_certain(found: re.Match[str]) -> bool:
    """Whether a known word is good in every kernel."""
    if found[1] in _SOME_KERNELS:
        return False
    condition = _CONDITIONS.get(found[1])
    return condition is None or bool(condition[1].fullmatch(found[3]))


def _invalid(reason: str) -> KernelError:
    return KernelError(errno.EINVAL, reason, "ima_parse_rule")


def _not_in_force(rules: int) -> str:
    return f"{rules} rule(s) of IMA are not in force" if rules else "a policy of IMA without a rule"
