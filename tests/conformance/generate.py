"""Sequences of steps from a seed: policies, nodes and descriptors for a mount; executions and tools too for run.

Left out is what the README's table lists as answered by FUSE itself: lseek, reads and writes of no octets beside a
mount, and a write of exactly 4 MiB.
"""

import base64
import os
import random
from typing import Any

from tests.conformance import files
from tests.conformance.payloads import DIGESTS, SIGNERS, Payload, octets
from tests.conformance.seals import KINDS, UNSEALED, argument, signature

Step = dict[str, Any]

#: What a sequence is for: a mounted emulator with system calls alone, or with shells and tools as well; or ``run``,
#: without and with volumes on dm-verity, or with files sealed by fs-verity.
WAYS = ("mount", "tools", "run", "volumes", "seals")
#: Those in which what is executed is judged.
JUDGED = ("run", "volumes", "seals")
#: Sequences are numbered from here, with two digits: their policies' versions rise with them, so that the policy that a
#: sequence starts with can always be activated.
FIRST, LAST = 10, 99
NAMES = ("A", "B", "Cc")
PRECIOUS = "Reset{base}"
NODES = ("active", "update", "delete", "name", "version", "policy", "pkcs7")
#: Long enough for every policy; the kernel cuts nothing that fits.
_WHOLE = 1 << 17
#: MAX_ARG_STRLEN: octets of one argument of execve(2).
_LONGEST_ARGUMENT = 1 << 17

BOOLEANS = (
    "1", "0", "y", "n", "Y", "N", "t", "F", "on", "off", "oN", "oFF", "of", "o", "1\n", "0\n", "2", " 1", "1 ", "-1",
    "01", "10",
    "true", "false", "yes", "\0", "\0001", "1\0", "on\n", "offf", "\n", "1" * 300, "0" * 5000, "x", "\xff", "o\0",
    "\t1",
)  # fmt: skip
OPERATIONS = ("EXECUTE", "FIRMWARE", "KMODULE", "KEXEC_IMAGE", "KEXEC_INITRAMFS", "POLICY", "X509_CERT")
PROPERTIES = (
    "boot_verified=TRUE", "boot_verified=FALSE", "dmverity_signature=TRUE", "dmverity_signature=FALSE",
    "fsverity_signature=TRUE", "fsverity_signature=FALSE", "dmverity_roothash=sha256:" + "ab" * 32,
    "fsverity_digest=sha256:" + "cd" * 32, "dmverity_roothash=sha1:" + "01" * 20,
)  # fmt: skip
VOLUME_PROPERTIES = (
    "dmverity_roothash={dmv}", "dmverity_roothash={dmvs}", "dmverity_roothash={dmv512}", "dmverity_signature=TRUE",
    "dmverity_signature=FALSE",
)  # fmt: skip
PLACES = ("initramfs/bin", "initramfs/bin", "tmpfs", "bind", "overlay/bin", "overlay/bin", "noexec", "links")
VOLUME_PLACES = ("dmv/bin", "dmvs/bin", "dmv512/bin", "overlay-dmvs/bin")
#: Right digests and such of other files and kinds, and right ones under another algorithm's name.
SEAL_PROPERTIES = (
    *(f"fsverity_digest={{{kind} {name}}}" for kind in KINDS for name in ("busybox", "true", "script", "dynamic")),
    *(f"fsverity_digest={{{kind} {name}}}" for kind in ("sha256", "sha512s") for name in ("empty", "garbage", "plain")),
    *("fsverity_signature=TRUE", "fsverity_signature=FALSE") * 5,
    "fsverity_digest={sha256:sha512 busybox}", "fsverity_digest={sha512:sha256 true}",
    "fsverity_digest={sha256 busybox}00", "dmverity_roothash={sha256 busybox}",
)  # fmt: skip
SEAL_PLACES = (
    *(f"fsv/layers/{kind}/bin" for kind in (*KINDS, *KINDS, UNSEALED, UNSEALED)),
    *(f"overlay-fsv/{kind}/bin" for kind in (*KINDS, UNSEALED)),
    *("bind-fsv/sha256/bin", "bind-fsv/sha512s/bin", "bind-fsv/unsealed/bin"),
    *("fsv/new",) * 6,
)
BAD_PROPERTIES = (
    "boot_verified=true", "boot_verified", "boot_verified=TRUE=FALSE", "dmverity_roothash=sha256",
    "fsverity_digest=:ab",
    "dmverity_roothash=sha256:abc", "dmverity_roothash=" + "a" * 70 + ":ab", "unknown=TRUE", "=TRUE", "op=EXECUTE",
    "DEFAULT",
)  # fmt: skip
HEADERS = (
    "policy_name={name} policy_version={version}", "policy_version={version} policy_name={name}",
    "policy_name={name}\tpolicy_version={version}  ", "  policy_name={name} policy_version={version}\r",
    "policy_name={name}", "policy_name={name} policy_version={version} x=1",
    "policy_name = {name} policy_version={version}",
    "POLICY_NAME={name} policy_version={version}", "# comment\npolicy_name={name} policy_version={version}",
    "\n\npolicy_name={name} policy_version={version}", "policy_name={name} policy_version={version} # comment",
)  # fmt: skip
#: Files that sequences make, and what else they look for beside files.NAMES.
NEW_NAMES = ("busybox", "script", "new", "true")
_MORE_NAMES = ("true", "none", "via_tmpfs")
ODD_NAMES = ("", ".", "..", "a/b", "x" * 255, "x" * 256, "\xe9", "a\x0bb", 'q"q', "a=b", "#", "A#", "\x7f", "Reset")
ODD_VERSIONS = (
    "1",
    "1.2",
    "1.2.3.4",
    "65536.0.0",
    "-1.0.0",
    "a.b.c",
    "1..2",
    "",
    "01.2.3",
    "0x1.0.0",
    "1.0.0x",
    "+1.0.0",
)


#: The rest of policies under which something can be executed.
_LENIENT = {
    "run": (
        "DEFAULT action=ALLOW\n",
        "DEFAULT action=DENY\nDEFAULT op=EXECUTE action=ALLOW\n",
        "DEFAULT action=ALLOW\nop=EXECUTE boot_verified=TRUE action=DENY\nop=KMODULE action=DENY\n",
        "DEFAULT action=DENY\nop=EXECUTE boot_verified=FALSE action=ALLOW\nop=KMODULE action=ALLOW\n",
    ),
    "volumes": (
        "DEFAULT action=DENY\nop=EXECUTE dmverity_signature=TRUE action=ALLOW\nop=EXECUTE boot_verified=TRUE"
        " action=ALLOW\n",
        "DEFAULT action=ALLOW\nop=EXECUTE dmverity_roothash={dmv512} action=DENY\nop=KMODULE"
        " dmverity_signature=TRUE action=DENY\nop=EXECUTE dmverity_roothash={dmvs} dmverity_signature=FALSE"
        " action=DENY\n",
    ),
    "seals": (
        "DEFAULT action=DENY\nop=EXECUTE fsverity_signature=TRUE action=ALLOW\nop=EXECUTE boot_verified=TRUE"
        " action=ALLOW\n",
        "DEFAULT action=DENY\nop=EXECUTE fsverity_digest={sha256 busybox} action=ALLOW\nop=EXECUTE"
        " fsverity_digest={sha512s script} fsverity_signature=TRUE action=ALLOW\nop=EXECUTE"
        " fsverity_digest={salted true} action=ALLOW\nop=EXECUTE boot_verified=TRUE action=ALLOW\n",
        "DEFAULT action=ALLOW\nop=EXECUTE fsverity_digest={sha512 busybox} fsverity_signature=FALSE action=DENY\n"
        "op=EXECUTE fsverity_digest={sha256s true} action=DENY\nop=KMODULE fsverity_signature=TRUE action=DENY\n",
    ),
}


class Generator:
    """Makes sequences. The same seed gives the same ones; not ``admitting``, no rule of theirs allows op=POLICY."""

    def __init__(self, seed: int, *, admitting: bool = True) -> None:
        self.random = random.Random(seed)
        self._admitting = admitting
        self._begin()

    def _begin(self, way: str = "mount") -> None:
        media = {"volumes": (VOLUME_PROPERTIES * 2, VOLUME_PLACES * 3), "seals": (SEAL_PROPERTIES, SEAL_PLACES)}
        properties, places = media.get(way, ((), ()))
        self._properties: tuple[str, ...] = PROPERTIES + properties
        self._places: tuple[str, ...] = PLACES + places
        # Where copies are put, and of what the files that can be sealed probably are copies.
        self._copied_to: tuple[str, ...] = ("/mnt/tmpfs/", "/mnt/overlay/bin/", "/mnt/scratch/")
        self._new: dict[str, str] = {}
        # What is probably there, so that most steps find what they ask for: names of policies, and open descriptors.
        self._loaded = [PRECIOUS]
        self._open: list[str] = []

    def sequence(self, length: int, *, way: str) -> list[Step]:
        """A sequence of ``length`` steps, for one of `WAYS`."""
        self._begin(way)
        kinds = [
            (self.load, 16), (self.update, 12), (self.boolean, 12), (self.activate, 12), (self.delete, 5), (self.read,
            14),
            (self.look, 9), (self.open, 9), (self.use_descriptor, 15), (self.attributes, 5), (self.not_there, 3),
            (self.together, 3),
        ]  # fmt: skip
        if way == "tools":
            kinds += [(self.shell, 40)]
        if way in JUDGED:
            kinds += [
                (self.shell, 12), (self.execute, 30), (self.map_memory, 12), (self.module, 3), (self.copy, 4),
                (self.without_memory, 3), (self.of_nothing, 3),
            ]  # fmt: skip
        if way == "seals":
            self._copied_to += ("/mnt/fsv/new/",) * 9 + ("/mnt/overlay-fsv/sha256/bin/",)
            kinds += [(self.copy, 8), (self.seal, 14), (self.measure, 4), (self.alter, 8)]
        makers, weights = zip(*kinds, strict=True)
        steps = self._start(way) if way in JUDGED and self.random.random() < 0.5 else []
        while len(steps) < length:
            step = self.random.choices(makers, weights)[0]()
            # Beside a mount nothing that is executed is judged: the kernel stays permissive, so that its shells run.
            if way != "tools" or "enforce" not in step.get("path", "") + step.get("script", ""):
                steps.append(step)
        return steps

    def _start(self, way: str) -> list[Step]:
        """Activate a policy under which something can be executed, most often the host's shells; record all of it."""
        bodies = _LENIENT.get(way, ())
        body = self.random.choice(bodies if bodies and self.random.random() < 0.7 else _LENIENT["run"])
        policy = {"text": "policy_name=Lenient policy_version={base}.0.0\n" + body, "signer": "trusted"}
        self._loaded.append("Lenient")
        one = {"literal": "1"}
        return [
            {"op": "write", "path": path, "flags": os.O_WRONLY, "payloads": [payload]}
            for path, payload in (
                ("ipe/new_policy", policy), ("ipe/policies/Lenient/active", one), ("ipe/success_audit", one)
            )
        ]  # fmt: skip

    # -- payloads ---------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        if self.random.random() < 0.06:
            return self.random.choice(ODD_NAMES)
        return self.random.choice((*NAMES, *NAMES, *NAMES, PRECIOUS, "AllowInitramfs"))

    def _version(self) -> str:
        chance = self.random.random()
        if chance < 0.05:
            return self.random.choice(ODD_VERSIONS)
        if chance < 0.12:
            return f"{self.random.randrange(10)}.{self.random.randrange(70000)}.0"
        return f"{{base}}.{self.random.randrange(2)}.{self.random.randrange(5)}"

    def _rule(self) -> str:
        chance = self.random.random()
        if chance < 0.12:
            return self.random.choice(
                ("# a comment", "", "   ", "\t", "op=EXECUTE boot_verified=TRUE action=ALLOW # not")
            )
        if chance < 0.2:
            return f"DEFAULT op={self.random.choice(OPERATIONS)} action={self.random.choice(('ALLOW', 'DENY'))}"
        properties = self.random.sample(self._properties, self.random.choice((0, 1, 1, 1, 2, 3)))
        if chance > 0.97:
            properties.append(self.random.choice(BAD_PROPERTIES))
        operation = "EXECUTE" if self.random.random() < 0.6 else self.random.choice(OPERATIONS)
        action = self.random.choice(("ALLOW", "ALLOW", "DENY"))
        if operation == "POLICY" and not self._admitting:
            action = "DENY"
        words = [f"op={operation}", *properties, f"action={action}"]
        if chance > 0.985:
            self.random.shuffle(words)
        return self.random.choice((" ", " ", " ", "  ", "\t")).join(words)

    def _body(self) -> str:
        defaults = ("DEFAULT action=DENY",) * 20 + ("DEFAULT action=ALLOW",) * 20 + ("", "DEFAULT action=X")
        default = self.random.choice(defaults)
        lines = [default, *(self._rule() for _ in range(self.random.choice((0, 1, 1, 2, 3, 5))))]
        if self.random.random() < 0.1:
            self.random.shuffle(lines)
        end = self.random.choice(("\n", "\n", "\n", "", "\r\n"))
        return "\n".join(lines) + end

    def policy(self, name: str | None = None) -> Payload:
        """A policy that is most often good."""
        header = HEADERS[0] if self.random.random() < 0.9 else self.random.choice(HEADERS)
        name = self._name() if name is None else name
        text = header.replace("{name}", name).replace("{version}", self._version()) + "\n" + self._body()
        payload: Payload = {"text": text}
        if self.random.random() < 0.02:
            payload["pad"] = self.random.choice((4000, 8200, 60000, 64000, 65000, 70000, 200000))
        if self.random.random() < 0.05:
            return payload  # not signed
        payload["signer"] = "trusted" if self.random.random() < 0.8 else self.random.choice(SIGNERS)
        if self.random.random() < 0.15:
            payload["digest"] = self.random.choice(list(DIGESTS))
        for option, chance in (("attributes", 0.1), ("detached", 0.02), ("no_certificates", 0.05)):
            if self.random.random() < chance:
                payload[option] = True
        if self.random.random() < 0.05:
            payload["certificate"] = self.random.choice(SIGNERS)
        if self.random.random() < 0.12:
            payload["mutate"] = [self._mutation() for _ in range(self.random.choice((1, 1, 2, 4)))]
        return payload

    def _mutation(self) -> list[Any]:
        kind = self.random.choice(("set", "flip", "flip", "insert", "cut", "double", "truncate", "append"))
        # Most of what is interesting is at both ends: headers and algorithm identifiers, certificates and signature.
        place = self.random.choice((self.random.random(), self.random.random() ** 3, 1 - self.random.random() ** 3))
        value = self.random.randrange(1, 64 if kind in ("cut", "double") else 256)
        return [kind, round(min(place, 0.9999), 4), value]

    def _value(self) -> Payload:
        if self.random.random() < 0.7:
            return {"literal": self.random.choice(("1", "1", "0", "1\n"))}
        return {"literal": self.random.choice(BOOLEANS)}

    def _who(self, step: Step) -> Step:
        chance = self.random.random()
        if chance < 0.1:
            step["as"] = "root without CAP_MAC_ADMIN"
        elif chance < 0.16:
            step["as"] = "uid 1000"
        elif chance < 0.18:
            step["as"] = "root in a user namespace of its own"
        elif chance < 0.2:
            step["as"] = "uid 1000 with capabilities"
        elif chance < 0.24:
            step["auid"] = self.random.choice((0, 1000, 65533))
        return step

    def _flags(self) -> int:
        return self.random.choice(
            (os.O_WRONLY,) * 8
            + (os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC,
               os.O_WRONLY | os.O_NONBLOCK, os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, os.O_WRONLY | os.O_SYNC,
               os.O_WRONLY | os.O_NOFOLLOW, os.O_WRONLY | os.O_DIRECTORY)
        )  # fmt: skip

    def _write(self, path: str, payloads: list[Payload]) -> Step:
        return self._who({"op": "write", "path": path, "flags": self._flags(), "payloads": payloads})

    def _directory(self) -> str:
        if self.random.random() < 0.85:
            return f"ipe/policies/{self.random.choice(self._loaded)}"
        return f"ipe/policies/{self.random.choice((*NAMES, 'AllowInitramfs', 'none'))}"

    def _node(self) -> str:
        chance = self.random.random()
        if chance < 0.25:
            return self.random.choice(("ipe/enforce", "ipe/success_audit", "ipe/new_policy"))
        return f"{self._directory()}/{self.random.choice(NODES)}"

    # -- steps ------------------------------------------------------------------------------------------------------

    def load(self) -> Step:
        """Write to new_policy: once, or several policies by one descriptor."""
        payloads = [self.policy() for _ in range(self.random.choice((1, 1, 1, 1, 2, 3)))]
        if self.random.random() < 0.04:
            payloads.append(self._value())
        for payload in payloads:
            name = payload["text"].partition("policy_name=")[2].partition(" ")[0] if "text" in payload else ""
            if payload.get("signer") == "trusted" and "mutate" not in payload and name in NAMES:
                self._loaded.append(name)
        return self._write("ipe/new_policy", payloads)

    def update(self) -> Step:
        """Write to a policy's update node, most often something of its name."""
        directory = self._directory()
        name = directory.rpartition("/")[2] if self.random.random() < 0.85 else None
        payloads = [self.policy(name) for _ in range(self.random.choice((1, 1, 1, 2)))]
        return self._write(f"{directory}/update", payloads)

    def boolean(self) -> Step:
        """Write to one of the two switches."""
        node = self.random.choice(("ipe/enforce", "ipe/success_audit"))
        return self._write(node, [self._value() for _ in range(self.random.choice((1, 1, 1, 2)))])

    def activate(self) -> Step:
        """Make a policy the active one."""
        return self._write(f"{self._directory()}/active", [self._value()])

    def delete(self) -> Step:
        """Delete a policy."""
        directory = self._directory()
        name = directory.rpartition("/")[2]
        if name != PRECIOUS:
            self._loaded = [other for other in self._loaded if other != name]
        return self._write(f"{directory}/delete", [self._value()])

    def read(self) -> Step:
        """Read a node to its end, in pieces."""
        path, chunk = self._node(), self.random.choice((1, 2, 7, 4096, _WHOLE))
        if chunk < 4096 and not path.endswith(("enforce", "success_audit", "active", "version", "name")):
            chunk = 777
        step: Step = {"op": "read", "path": path, "chunk": chunk}
        if self.random.random() < 0.15:
            step = {
                "op": "pread", "path": path, "length": self.random.choice((1, 5, 4096)),
                "offset": self.random.choice((0, 1, 2, 3, 100, 10**6)),
            }  # fmt: skip
        return self._who(step)

    def look(self) -> Step:
        """List a directory, stat a node, or ask for access to it."""
        operation = self.random.choice(("list", "list", "stat", "stat", "access_r", "access_w", "access_x"))
        if operation == "list":
            path = self.random.choice(("ipe/policies", "ipe/policies", "ipe", self._directory(), "ipe/enforce"))
        else:
            path = self.random.choice((self._node(), self._node(), "ipe/policies", "ipe", self._directory()))
        return self._who({"op": operation, "path": path})

    def open(self) -> Step:
        """Open a node, to be used later."""
        name = str(self.random.randrange(6))
        self._open.append(name)
        if self.random.random() < 0.08:
            path = self.random.choice(("ipe", "ipe/policies", self._directory(), self._directory()))
            return self._who({"op": "fd_open", "fd": name, "path": path, "flags": os.O_RDONLY | os.O_DIRECTORY})
        flags = self.random.choice((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_WRONLY, os.O_WRONLY, os.O_RDWR))
        if self.random.random() < 0.03:
            flags |= self.random.choice((os.O_DIRECT, os.O_PATH, os.O_TRUNC))
        return self._who({"op": "fd_open", "fd": name, "path": self._node(), "flags": flags})

    def use_descriptor(self) -> Step:
        """Do something with a descriptor that may be open, whatever became of its node."""
        operation = self.random.choice((
            "fd_read", "fd_read", "fd_read", "fd_write", "fd_write", "fd_write", "fd_write", "fd_pread", "fd_pwrite",
            "fd_writev", "fd_writev", "fd_list", "fd_close", "fd_sync", "fd_chmod",
        ))  # fmt: skip
        name = self.random.choice(self._open) if self._open and self.random.random() < 0.9 else "0"
        step: Step = {"op": operation, "fd": name}
        if operation == "fd_close":
            self._open = [other for other in self._open if other != name]
        if operation in ("fd_read", "fd_pread"):
            step["length"] = self.random.choice((1, 2, 5, 4096))
        if operation in ("fd_pread", "fd_pwrite"):
            step["offset"] = self.random.choice((0, 0, 1, 3, 10**6))
        if operation in ("fd_write", "fd_pwrite"):
            step["payload"] = self._value() if self.random.random() < 0.6 else self.policy()
        if operation == "fd_writev":
            step["payloads"] = [self._value() if self.random.random() < 0.7 else self.policy() for _ in range(2)]
        if operation == "fd_chmod":
            step["mode"] = self.random.choice((0o600, 0o644, 0))
        return self._who(step)

    def attributes(self) -> Step:
        """Change a node's attributes; most of it is kept, to no effect."""
        path = self.random.choice((self._node(), self._node(), "ipe/policies", self._directory(), "ipe"))
        step: Step = self.random.choice((
            {"op": "chmod", "path": path, "mode": self.random.choice((0o777, 0o600, 0, 0o4755))},
            {"op": "chown", "path": path, "uid": self.random.choice((0, 1000))},
            {"op": "truncate", "path": path, "size": self.random.choice((0, 5, 1 << 20))},
            {"op": "utime", "path": path},
        ))  # fmt: skip
        return self._who(step)

    def not_there(self) -> Step:
        """Try what securityfs lets nobody do."""
        path = self.random.choice(
            (self._node(), "ipe/new", "ipe/policies/new", self._directory(), "ipe/policies", "x" * 256)
        )
        operation = self.random.choice(("mkdir", "rmdir", "unlink", "symlink", "mknod", "creat", "rename", "link"))
        step: Step = {"op": operation, "path": path}
        if operation in ("rename", "link"):
            step["to"] = self.random.choice(("ipe/elsewhere", "ipe/policies/other", self._node(), self._directory()))
        return self._who(step)

    def together(self) -> Step:
        """Several processes write the same at once: whatever their order, all get the same answers between them."""
        each = self.random.choice((self.load, self.update, self.activate))()
        del each["payloads"][1:]  # else it is a matter of their order who gets which answer
        return {"op": "together", "writers": self.random.choice((2, 3, 4)), "each": each}

    # -- what is executed -------------------------------------------------------------------------------------------

    def shell(self) -> Step:
        """A tool of busybox or coreutils writes a file to a node, or reads one."""
        node = self._node().removeprefix("ipe/") if self.random.random() < 0.75 else "new_policy"
        into_policy = node.endswith(("new_policy", "update"))
        payload = self.policy() if into_policy else self._value()
        if into_policy and self.random.random() < 0.2:
            payload["pad"] = self.random.choice((5000, 9000, 40000, 66000, 140000))
        tool = self.random.choice(("", "busybox "))
        script = self.random.choice((
            f"{tool}cat $S/f > {node}", f"{tool}tee {node} < $S/f >/dev/null",
            f"{tool}dd if=$S/f of={node} bs=1M status=noxfer",
            f"{tool}dd if=$S/f of={node} bs=512 conv=notrunc status=noxfer", f"{tool}cp $S/f {node}",
            f"{tool}cat $S/f >> {node}",
            f"printf '%s' \"$({tool}cat $S/f)\" > {node}", f"echo 1 > {node}; echo $?",
            f"printf 1 | {tool}tee -a {node}",
            f"{tool}cat {node}", f"{tool}wc -c < {node}", f"{tool}dd if={node} bs=3 2>/dev/null",
            f"{tool}cp {node} $S/out",
            f"{tool}head -c 4 {node}", f"{tool}grep -c . {node}", f"{tool}ls policies", f"read x < {node}; echo $x",
            f"{tool}printf 1 > {node}", f"/usr/bin/printf '%s' \"$(cat $S/f)\" > {node}",
            f"{tool}mv {node} policies/elsewhere", f"{tool}chmod 640 {node}", f"{tool}rm -f {node}",
            f"{tool}stat -c '%a %U %h %F' {node}", f"{tool}touch {node}", f"test -s {node}; echo $?",
        ))  # fmt: skip
        shell = self.random.choice((["/bin/dash", "-c"], ["/bin/bash", "-c"], ["/bin/busybox", "sh", "-c"]))
        if script.startswith("/usr/bin/printf") and payload.get("pad", 0) >= _LONGEST_ARGUMENT:
            payload["pad"] = _LONGEST_ARGUMENT // 2  # errors of argv are in the README's table
        return {"op": "shell", "shell": shell, "script": script, "payload_file": payload}

    def _program(self) -> str:
        directory = self.random.choice(self._places)
        name = self.random.choice((*NEW_NAMES, "none") if directory == "fsv/new" else (*files.NAMES, *_MORE_NAMES))
        return self.random.choice((f"/mnt/{directory}/{name}",) * 9 + ("/bin/true",))

    def execute(self) -> Step:
        """Execute a file."""
        step: Step = {"op": self.random.choice(("execve",) * 6 + ("execveat", "memfd")), "file": self._program()}
        if step["op"] == "execve" and step["file"].endswith("busybox"):
            step["argv"] = ["true"]
        if step["op"] == "execveat":
            step["inheritable"] = self.random.random() < 0.7
            step["check"] = self.random.random() < 0.4
        if self.random.random() < 0.1:
            step["as"] = "uid 1000"
        return step

    def map_memory(self) -> Step:
        """Map memory for execution, or make it executable."""
        step: Step = {
            "op": "mmap", "prot": self.random.choice((5, 5, 1, 3, 7, 4)), "flags": self.random.choice((1, 2, 2)),
            "then": self.random.choice(([], [], [5], [1, 5], [5, 5], [7])),
        }  # fmt: skip
        if self.random.random() < 0.75:
            step["file"] = self._program()
        return step

    def of_nothing(self) -> Step:
        """Read or write no bytes."""
        if self._open and self.random.random() < 0.5:
            return {"op": "fd_read", "fd": self.random.choice(self._open), "length": 0}
        return {"op": "write", "path": self._node(), "flags": os.O_WRONLY, "payloads": [{"literal": ""}]}

    def without_memory(self) -> Step:
        """Have the kernel itself carry data from or to a node, which securityfs does for nobody."""
        into = self.random.random() < 0.5
        call = self.random.choice(("sendfile", "copy_file_range", "splice"))
        return {"op": "carry", "call": call, "path": self._node(), "into": into, "payload_file": self._value()}

    def module(self) -> Step:
        """Load what is no module."""
        return {"op": "module", "file": self._program(), "from_buffer": self.random.random() < 0.4}

    def copy(self) -> Step:
        """Put a copy of a program where it was not."""
        name = self.random.choice(("busybox", "script", "garbage", "dynamic"))
        to = self.random.choice(self._copied_to) + self.random.choice(NEW_NAMES)
        self._new[to] = name
        return {"op": "copy", "file": f"/mnt/initramfs/bin/{name}", "to": to}

    def _sealable(self) -> str:
        """A file that can most often be sealed."""
        if self.random.random() < 0.85:
            return f"/mnt/fsv/new/{self.random.choice(NEW_NAMES)}"
        # Not the host's files, which lie on another file system on a kernel.
        return f"/mnt/{self.random.choice(self._places)}/{self.random.choice(files.NAMES)}"

    def seal(self) -> Step:
        """Seal a file by fs-verity, with or without a signature."""
        file, kind = self._sealable(), self.random.choice(tuple(KINDS))
        step: Step = {"op": "seal", "file": file, "kind": kind}
        if self.random.random() < 0.6:
            name = self._new.get(file, "busybox") if self.random.random() < 0.85 else "true"
            step["signed"] = [self.random.choice(("trusted",) * 5 + ("untrusted", "ca")), kind, name]
        if self.random.random() < 0.05:
            step["flags"] = self.random.choice((os.O_RDWR, os.O_WRONLY))
        if self.random.random() < 0.05:
            step["as"] = "uid 1000"
        return step

    def measure(self) -> Step:
        """Ask for a file's digest."""
        return {"op": "measure", "file": self._sealable()}

    def alter(self) -> Step:
        """Change a file that is probably sealed, or its name."""
        how = self.random.choice(("append", "append", "truncate", "chmod", "utime", "rename", "link", "unlink"))
        file = f"/mnt/fsv/new/{self.random.choice(NEW_NAMES)}"
        step: Step = {"op": "alter", "how": how, "file": file}
        if how in ("append", "truncate") and self.random.random() < 0.3:
            step["file"] = f"/mnt/fsv/layers/{self.random.choice(tuple(KINDS))}/bin/busybox"
        if how == "chmod":
            step["mode"] = self.random.choice((0o755, 0o755, 0o644, 0o555))
        if how in ("rename", "link"):
            step["to"] = f"/mnt/fsv/new/{self.random.choice(NEW_NAMES)}"
            self._new[step["to"]] = self._new.get(file, "busybox")
        return step


def enforcing(way: str) -> str:
    """The switch with which sequences of a way start. What tools do beside a mount is judged by a kernel alone."""
    return "0" if way == "tools" else "1"


def reset(base: int, *, enforce: str = "1") -> Step:
    """The step that every sequence starts with."""
    text = (
        f"policy_name=Reset{base} policy_version={base}.0.0\nDEFAULT action=DENY\n"
        "op=EXECUTE boot_verified=TRUE action=ALLOW\n"
    )
    data = octets({"text": text, "signer": "trusted"}, base)
    encoded = base64.b64encode(data).decode()
    return {"op": "reset", "data": encoded, "name": f"Reset{base}", "enforce": enforce}


def concrete(step: Step, base: int) -> Step:
    """The step as the driver does it: payloads made, names filled in."""
    done = {key: value for key, value in step.items() if key not in ("payloads", "payload", "payload_file")}
    for key in ("path", "to", "script"):
        if key in done:
            done[key] = done[key].replace("{base}", str(base))

    def made(payload: Payload) -> str:
        data = octets(payload, base)
        # A write of nothing is its own step (of_nothing): beside a mount it never reaches the emulator.
        return base64.b64encode(data if data or payload.get("literal") == "" else b"-").decode()

    if "each" in step:
        done["each"] = concrete(step["each"], base)
    if "payloads" in step:
        done["writes"] = [made(payload) for payload in step["payloads"]]
    if "payload" in step:
        done["data"] = made(step["payload"])
    if step["op"] == "seal":
        done |= argument(step["kind"], signature(*step["signed"]) if "signed" in step else b"")
    if "payload_file" in step:
        done["files"] = {"f": made(step["payload_file"])}
    return done
