"""The one object with state: the policies, the active one, enforce and success_audit.

Synchronous and thread-safe, without input or output of its own: who writes, which program that is and what a path
holds comes in as values and callables; records, and news of policies that appear or vanish, go out through callables.
Method names are the kernel's (security/ipe/fs.c, policy_fs.c, policy.c, eval.c).
"""

import errno
import threading
from collections.abc import Callable
from typing import NoReturn

from attrs import define, field, frozen

from ipe_emu import audit
from ipe_emu.audit import AuditedPolicy, AuditRecord
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity_signature import verify_signature
from ipe_emu.keyring import Keyrings
from ipe_emu.pkcs7 import verify_pkcs7_signature
from ipe_emu.policy.evaluate import Match, Verdict, evaluate
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import check_name, parse_policy
from ipe_emu.policy.rule import Action, Operation, Policy
from ipe_emu.profiles import DEFAULT_PROFILE, UPSTREAM_OF_OP_POLICY, Profile

#: A write this long cannot be copied in: kmalloc() gives at most 4 MiB, and new_policy wants a NUL behind it.
WRITE_LIMIT = 4 << 20

#: The first octet of every SignedData that the kernel's ASN.1 decoder lets in, and of no policy text.
_ASN1_SEQUENCE = b"\x30"
_WHITE_SPACE = b" \t\n\v\f\r"


@frozen
class Opener:
    """The credentials a node was opened with; they count for as long as the descriptor lives (``file_ns_capable()``).

    ``cap_mac_admin`` is CAP_MAC_ADMIN in the effective set, in the user namespace of the rehearsed machine.
    """

    cap_mac_admin: bool


@frozen
class Login:
    """The login user id and the session id of a task (``audit_get_loginuid()``, ``audit_get_sessionid()``)."""

    auid: int = audit.UNSET_ID
    ses: int = audit.UNSET_ID


def _no_executable() -> None:
    return None


def _no_login() -> Login:
    return Login()


def _no_file(_path: bytes) -> NoReturn:
    raise KernelError(errno.EACCES, "this writer cannot have a policy file read for it", "kernel_read_file_from_path")


@frozen
class Writer:
    """Who writes to a node, and what audit records and op=POLICY may want to know of it.

    ``login`` gives what records of changes name: of the task that writes, whoever opened the node (``current`` in
    security/ipe/audit.c). It is called while that waits, and only if there is a record.

    ``executable`` gives the program that writes (``mm->exe_file``), or None where it cannot be established, which no
    rule admits. ``read_policy_file`` opens a path as the writer would and gives the file and its content; it raises
    KernelError with the errno of what stopped it. Both are called only under a profile with unsigned policies.
    """

    opener: Opener
    subject: Subject
    executable: Callable[[], File | None] = _no_executable
    read_policy_file: Callable[[bytes], tuple[File, bytes]] = _no_file
    login: Callable[[], Login] = _no_login


@frozen
class _Content:
    """One version of a loaded policy (kernel: ``struct ipe_policy``); ``pkcs7`` is None for an unsigned one."""

    policy: Policy
    index: RuleIndex
    text: bytes
    pkcs7: bytes | None
    is_boot_policy: bool = False

    @property
    def audited(self) -> AuditedPolicy:
        covered = b"" if self.is_boot_policy else self.text if self.pkcs7 is None else self.pkcs7
        return AuditedPolicy(self.policy, covered)


@define(eq=False)
class LoadedPolicy:
    """One directory below ``policies/`` (the inode whose ``i_private`` is the policy).

    It keeps its identity through updates; once deleted it answers ENOENT forever, also to descriptors still open.
    """

    name: str
    _content: _Content | None
    # The kernel's inode lock of the directory: an update and a deletion of one policy do not meet.
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    @property
    def signed(self) -> bool:
        """Whether what is loaded now came with a signature (the boot policy did not)."""
        return self._current().pkcs7 is not None

    @property
    def policy(self) -> Policy:
        """The parsed policy that is loaded now; KernelError ENOENT once it is deleted."""
        return self._current().policy

    def _current(self) -> _Content:
        if self._content is None:
            raise KernelError(errno.ENOENT, f"the policy {self.name!r} was deleted", "securityfs_recursive_remove")
        return self._content


@frozen
class PolicyAdded:
    """A policy's directory appeared."""

    loaded: LoadedPolicy


@frozen
class PolicyRemoved:
    """A policy's directory vanished."""

    loaded: LoadedPolicy


@frozen
class Decision:
    """The answer to one event: 0 or EACCES, and the verdict behind it (None where no policy is active).

    With ``errno`` 0 and a verdict of DENY the machine is permissive.
    """

    errno: int
    verdict: Verdict | None


@frozen
class UpstreamRefusal:
    """Something op-policy did that a released kernel refuses: what, and that kernel's answer in words."""

    what: str
    answer: str
    replaced_signed: bool = False


@define(eq=False)
class Ipe:
    """The LSM. Every method named after a kernel function answers as that function, raising KernelError."""

    keyrings: Keyrings
    emit: Callable[[AuditRecord], None]
    profile: Profile = DEFAULT_PROFILE
    enforce: bool = True
    success_audit: bool = False
    upstream_refusals: list[UpstreamRefusal] = field(factory=list, init=False)
    _policies: dict[str, LoadedPolicy] = field(factory=dict, init=False)
    _active: _Content | None = field(default=None, init=False)
    _passed: tuple[_Content, Operation, Facts] | None = field(default=None, init=False)
    _listeners: list[Callable[[PolicyAdded | PolicyRemoved], None]] = field(factory=list, init=False)
    # The kernel's ipe_policy_lock, and with it everything above. Of the callables only ``emit`` is called under it, as
    # the kernel audits under its own: the order of records is the order of changes.
    _policy_lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    # -- life ---------------------------------------------------------------------------------------------------

    def load_boot_policy(self, text: bytes, *, filename: str = "<boot policy>") -> LoadedPolicy:
        """Make ``text`` the policy that is compiled into the kernel: active, and not audited (``ipe_init()``)."""
        policy = parse_policy(text, filename=filename)
        check_name(policy.name)
        content = _Content(policy, RuleIndex(policy), text, None, is_boot_policy=True)
        loaded = LoadedPolicy(policy.name, content)
        with self._policy_lock:
            self._policies[policy.name] = loaded
            self._active = content
        return loaded

    @property
    def policies(self) -> tuple[LoadedPolicy, ...]:
        """What is loaded, oldest first."""
        with self._policy_lock:
            return tuple(self._policies.values())

    @property
    def active(self) -> LoadedPolicy | None:
        """The active policy."""
        with self._policy_lock:
            return next((p for p in self._policies.values() if p._content is self._active), None)

    def subscribe(self, listener: Callable[[PolicyAdded | PolicyRemoved], None]) -> None:
        """Have ``listener`` called, in the writer's thread and without a lock, after policies appear or vanish."""
        self._listeners.append(listener)

    def _tell(self, news: PolicyAdded | PolicyRemoved) -> None:
        for listener in self._listeners:
            listener(news)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def process_event(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Decision:
        """Ask the active policy about one event and audit its answer (``ipe_evaluate_event()``).

        ``file`` is None where the kernel has none: anonymous memory, a module from a buffer. NotJudgedError, without a
        record, where the answer depends on facts of it that are in doubt.
        """
        verdict = self._evaluate(operation, hook, subject, file)
        if verdict is None:
            return Decision(0, None)
        denied = verdict.action is Action.DENY and self.enforce
        return Decision(errno.EACCES if denied else 0, verdict)

    def passes(self, operation: Operation, facts: Facts) -> bool:
        """Whether an event of a file with these facts would be allowed and leave no record; asking leaves none."""
        active = self._active
        if active is None:
            return True
        if self.success_audit:
            return False
        # The same question comes again and again; it is the same if it is of the very same facts.
        last = self._passed
        if last is not None and last[0] is active and last[1] is operation and last[2] is facts:
            return True
        try:
            if evaluate(active.index, operation, facts).action is Action.DENY:
                return False
        except NotJudgedError:
            return False
        self._passed = active, operation, facts
        return True

    def _evaluate(self, operation: Operation, hook: Hook, subject: Subject, file: File | None) -> Verdict | None:
        active = self._active
        if active is None:
            return None
        verdict = evaluate(active.index, operation, file.facts if file else NO_FACTS)
        if verdict.action is Action.DENY or self.success_audit:
            text = _matched_text(verdict)
            self.emit(audit.access(operation, hook, enforcing=self.enforce, subject=subject, file=file, rule=text))
        return verdict

    # -- enforce and success_audit --------------------------------------------------------------------------------

    def getenforce(self) -> bytes:
        """What reading ``enforce`` gives."""
        return b"1" if self.enforce else b"0"

    def getaudit(self) -> bytes:
        """What reading ``success_audit`` gives."""
        return b"1" if self.success_audit else b"0"

    def setenforce(self, data: bytes, writer: Writer) -> int:
        """Write ``enforce``; a change is audited before it takes effect. Returns the length written."""
        _require_mac_admin(writer, "setenforce")
        value = kstrtobool(data)
        if value == self.enforce:
            return len(data)
        with self._policy_lock:
            old = self.enforce
            if value != old:
                by = writer.login()
                for record in audit.enforce_change(new=value, old=old, auid=by.auid, ses=by.ses):
                    self.emit(record)
                self.enforce = value
        return len(data)

    def setaudit(self, data: bytes, writer: Writer) -> int:
        """Write ``success_audit``. Returns the length written."""
        _require_mac_admin(writer, "setaudit")
        self.success_audit = kstrtobool(data)
        return len(data)

    # -- loading --------------------------------------------------------------------------------------------------

    def new_policy(self, data: bytes, writer: Writer) -> int:
        """Load a policy written to ``new_policy``. Returns the length written."""
        try:
            _require_mac_admin(writer, "new_policy")
            _check_length(data, "new_policy")
            content = self._admitted(data, writer)
            loaded = self._new_policyfs_node(content, writer)
        except KernelError as error:
            self._load_failed(error, writer)
            raise
        if content.pkcs7 is None:
            self._note_unsigned(content, replaced_signed=False)
        self._tell(PolicyAdded(loaded))
        return len(data)

    def _new_policyfs_node(self, content: _Content, writer: Writer) -> LoadedPolicy:
        name = content.policy.name
        check_name(name)
        with self._policy_lock:
            if name in self._policies:
                raise KernelError(
                    errno.EEXIST,
                    f"a policy named {name!r} is loaded; a newer version of it goes into policies/{name}/update",
                    "securityfs_create_dir",
                )
            loaded = self._policies[name] = LoadedPolicy(name, content)
            self._audit_load(content, writer)
        return loaded

    def update(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Replace a policy by a newer version of itself (``ipe_update_policy()``). Returns the length written."""
        try:
            _require_mac_admin(writer, "update_policy")
            _check_length(data, "update_policy")
            with loaded._lock:
                replaced_signed = self._update_locked(loaded, data, writer)
        except KernelError as error:
            self._load_failed(error, writer)
            raise
        content = loaded._content
        if content is not None and content.pkcs7 is None:
            self._note_unsigned(content, replaced_signed=replaced_signed)
        return len(data)

    def _update_locked(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> bool:
        old = loaded._current()
        new = self._admitted(data, writer)
        if new.policy.name != old.policy.name:
            raise KernelError(
                errno.EINVAL,
                f"the update is named {new.policy.name!r}, the policy {old.policy.name!r}",
                "ipe_update_policy",
            )
        if old.policy.version >= new.policy.version:
            raise KernelError(
                errno.ESTALE,
                f"the update has version {new.policy.version}, loaded is {old.policy.version}: it must be higher",
                "ipe_update_policy",
            )
        loaded._content = new
        self._audit_load(new, writer)
        with self._policy_lock:
            was_active = self._active is old
            if was_active:
                self._active = new
        if was_active:
            self._audit_activation(old, new, writer)
        return old.pkcs7 is not None

    def _admitted(self, data: bytes, writer: Writer) -> _Content:
        """Verify or admit what was written, and parse it (``ipe_new_policy()``)."""
        if not self.profile.unsigned_policies or data[:1] == _ASN1_SEQUENCE:
            return self._verified(data)
        if data[:1] == b"/":
            file, data = writer.read_policy_file(data.rstrip(_WHITE_SPACE))
            if self.process_event(Operation.POLICY, Hook.KERNEL_READ, writer.subject, file).errno:
                raise KernelError(
                    errno.EACCES, "op=POLICY denies reading the file that the path names", "ipe_kernel_read_file"
                )
            _check_length(data, "ipe_new_policy")
            if data[:1] == _ASN1_SEQUENCE:
                return self._verified(data)
            self._gate(writer, file)
        else:
            self._gate(writer, writer.executable())
        policy = parse_policy(data)
        return _Content(policy, RuleIndex(policy), data, None)

    def _verified(self, data: bytes) -> _Content:
        text = verify_pkcs7_signature(data, self.keyrings, unavailable_hashes=self.profile.unavailable_hashes)
        policy = parse_policy(text)
        return _Content(policy, RuleIndex(policy), text, data)

    def verify_fsverity_signature(self, digest: Digest, signature: bytes) -> None:
        """Raise KernelError unless the keyring ``.fs-verity`` verifies a file's builtin signature."""
        verify_signature(digest, signature, self.keyrings, unavailable_hashes=self.profile.unavailable_hashes)

    def _gate(self, writer: Writer, file: File | None) -> None:
        """Let an unsigned policy pass only where a rule of the active policy allows op=POLICY for ``file``.

        Permissive mode waives denials of execution, never a signature; and an ALLOW that is only a default answers as
        a kernel without the proposal does, so that nobody who says ``DEFAULT action=ALLOW`` loses signature checking.
        """
        try:
            verdict = self._evaluate(Operation.POLICY, Hook.POLICY_LOAD, writer.subject, file)
        except NotJudgedError as error:
            reason = f"the policy is not signed, and whether anything admits it could not be judged: {error}"
            raise KernelError(errno.EACCES, reason, "ipe_evaluate_event") from None
        if verdict is not None and verdict.action is Action.DENY:
            raise KernelError(
                errno.EACCES,
                f"the policy is not signed, and the active policy denies op=POLICY: {_matched_text(verdict).decode()}",
                "ipe_evaluate_event",
            )
        if verdict is None or verdict.match is not Match.RULE:
            why = "no policy is active" if verdict is None else "no op=POLICY rule matched, only a default allows it"
            raise KernelError(
                errno.EBADMSG, f"the policy is not signed, and nothing admits it: {why}", "pkcs7_parse_message"
            )
        if file is None:
            raise KernelError(
                errno.EACCES, "the policy is not signed, and which program writes it is not known", "ipe_evaluate_event"
            )

    def trust(self, keyrings: Keyrings) -> None:
        """Verify what is loaded from now on with other keyrings: a key was added, or taken away."""
        self.keyrings = keyrings

    def admit_key(self, subject: Subject, executable: File | None) -> None:
        """Let a program put a certificate into the keyring ``.ipe`` where a rule of op=POLICY allows it for it.

        KernelError EACCES where none does: not by a default, and permissive mode waives no signature.
        """
        verdict = self._evaluate(Operation.POLICY, Hook.POLICY_LOAD, subject, executable)
        if verdict is None:
            why = "no policy is active"
        elif verdict.action is Action.DENY:
            why = f"the active policy denies op=POLICY: {_matched_text(verdict).decode()}"
        elif verdict.match is not Match.RULE:
            why = "no op=POLICY rule matched, only a default allows it"
        elif executable is None:
            why = "which program adds it is not known"
        else:
            return
        raise KernelError(errno.EACCES, f"the keyring .ipe takes no certificate: {why}", "ipe_evaluate_event")

    def note_ipe_key(self, name: str) -> None:
        """Count a certificate that entered the keyring ``.ipe``, which released kernels do not have."""
        self.upstream_refusals.append(
            UpstreamRefusal(
                f"the certificate {name!r} entered the keyring .ipe",
                f"on {UPSTREAM_OF_OP_POLICY.name}: there is no such keyring",
            )
        )

    def _note_unsigned(self, content: _Content, *, replaced_signed: bool) -> None:
        policy = content.policy
        self.upstream_refusals.append(
            UpstreamRefusal(
                f"unsigned policy {policy.name} {policy.version} was admitted by op=POLICY",
                f"on {UPSTREAM_OF_OP_POLICY.name}: EBADMSG",
                replaced_signed=replaced_signed,
            )
        )

    def note_alias_use(self) -> None:
        """Count a use of the name ``activate``, which released kernels do not have."""
        self.upstream_refusals.append(
            UpstreamRefusal("the node was named activate", f"on {UPSTREAM_OF_OP_POLICY.name}: ENOENT")
        )

    def refuse_load(self, error: KernelError, writer: Writer) -> NoReturn:
        """Fail a load that never became one write's data, audited as any failed load."""
        self._load_failed(error, writer)
        raise error

    # -- audit of policies ------------------------------------------------------------------------------------------

    def _audit_load(self, content: _Content, writer: Writer) -> None:
        by = writer.login()
        self.emit(audit.policy_load(content.audited, auid=by.auid, ses=by.ses, with_errno=self.profile.audits_errno))

    def _load_failed(self, error: KernelError, writer: Writer) -> None:
        if self.profile.audits_failed_loads:
            by = writer.login()
            self.emit(audit.policy_load_failed(error.errno, auid=by.auid, ses=by.ses))

    def _audit_activation(self, old: _Content | None, new: _Content, writer: Writer) -> None:
        by = writer.login()
        before = old.audited if old else None
        self.emit(audit.policy_activation(before, new.audited, auid=by.auid, ses=by.ses))

    # -- a policy's nodes -------------------------------------------------------------------------------------------

    def setactive(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Make a policy the active one (``ipe_set_active_pol()``). Returns the length written."""
        _require_true(data, writer, "setactive")
        with loaded._lock:
            content = loaded._current()
            with self._policy_lock:
                active = self._active
                if active is content:
                    return len(data)
                # Versions are compared whatever the policies are named.
                if active is not None and active.policy.version > content.policy.version:
                    raise KernelError(
                        errno.EINVAL,
                        f"the active policy {active.policy.name} has version {active.policy.version}, "
                        f"{content.policy.name} has {content.policy.version}: it must not be lower",
                        "ipe_set_active_pol",
                    )
                self._active = content
                self._audit_activation(active, content, writer)
        return len(data)

    def delete_policy(self, loaded: LoadedPolicy, data: bytes, writer: Writer) -> int:
        """Delete a policy that is not active. Returns the length written."""
        _require_true(data, writer, "delete_policy")
        with loaded._lock:
            content = loaded._current()
            with self._policy_lock:
                if content is self._active:
                    raise KernelError(
                        errno.EPERM, f"{loaded.name} is the active policy; activate another first", "delete_policy"
                    )
                loaded._content = None
                del self._policies[loaded.name]
        self._tell(PolicyRemoved(loaded))
        return len(data)

    def getactive(self, loaded: LoadedPolicy) -> bytes:
        """What reading ``active`` gives."""
        return b"1" if loaded._current() is self._active else b"0"

    def read_name(self, loaded: LoadedPolicy) -> bytes:
        """What reading ``name`` gives."""
        return loaded.policy.name.encode("latin-1")

    def read_version(self, loaded: LoadedPolicy) -> bytes:
        """What reading ``version`` gives."""
        return str(loaded.policy.version).encode()

    def read_policy(self, loaded: LoadedPolicy) -> bytes:
        """What reading ``policy`` gives: the text as it was signed or written."""
        return loaded._current().text

    def read_pkcs7(self, loaded: LoadedPolicy) -> bytes:
        """What reading ``pkcs7`` gives; ENOENT for the boot policy and for one that was admitted unsigned."""
        pkcs7 = loaded._current().pkcs7
        if pkcs7 is None:
            raise KernelError(errno.ENOENT, f"the policy {loaded.name!r} has no signature", "read_pkcs7")
        return pkcs7


def kstrtobool(data: bytes) -> bool:
    """Read a boolean as ``kstrtobool_from_user()`` does, which looks at three bytes at the most.

    KernelError EINVAL for anything but y, Y, t, T, 1, n, N, f, F, 0, on and off (any case) at the start.
    """
    text = data[:3].partition(b"\0")[0]
    first = text[:1]
    if first in (b"y", b"Y", b"t", b"T", b"1"):
        return True
    if first in (b"n", b"N", b"f", b"F", b"0"):
        return False
    if first in (b"o", b"O"):
        second = text[1:2]
        if second in (b"n", b"N"):
            return True
        if second in (b"f", b"F"):
            return False
    raise KernelError(errno.EINVAL, "this is no boolean: write 1 or 0", "kstrtobool")


def _matched_text(verdict: Verdict) -> bytes:
    if verdict.rule is not None:
        return audit.rule_text(verdict.rule)
    scope = verdict.operation if verdict.match is Match.OPERATION_DEFAULT else None
    return audit.default_text(verdict.action, scope)


def _require_mac_admin(writer: Writer, function: str) -> None:
    if not writer.opener.cap_mac_admin:
        raise KernelError(
            errno.EPERM,
            "the node was opened without CAP_MAC_ADMIN; what was gained or dropped later does not count",
            function,
        )


def _require_true(data: bytes, writer: Writer, function: str) -> None:
    _require_mac_admin(writer, function)
    if not kstrtobool(data):
        raise KernelError(errno.EINVAL, "only a true value means something here: write 1", function)


def _check_length(data: bytes, function: str) -> None:
    if len(data) >= WRITE_LIMIT:
        raise KernelError(errno.ENOMEM, f"a write can carry less than 4 MiB, this is {len(data)} bytes", function)
