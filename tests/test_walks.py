"""The recorded walks against the model alone: every write, read, listing and audit record, without a mount."""

import base64
import errno
import re
from collections.abc import Callable
from typing import Any

import pytest

from ipe_emu.audit import AuditRecord
from ipe_emu.errors import KernelError
from ipe_emu.event import File, Subject
from ipe_emu.integrity.facts import Facts
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.lsm import Ipe, LoadedPolicy, Opener, Writer
from ipe_emu.profiles import PROFILES
from tests.vectors import BOOT_POLICY, KERNELS, KEYS, load

WALKS = [f"walk-{n}" for n in range(1, 7)]
# What belongs to the machine that recorded: the dev and ino of the recorder's files, and pids.
MACHINE = re.compile(rb"\b(pid|ino)=\d+|(?:comm|dev|path)=(?:\"[^\"]*\"|\w+)")


def normal(text: bytes) -> bytes:
    return MACHINE.sub(lambda m: m[0].split(b"=")[0] + b"=*", text)


class ModelWalk:
    """Puts the steps of one walk to an ``Ipe``, with the files that the walk's first line lists."""

    def __init__(self, profile: str, files: dict[str, str]) -> None:
        self.records: list[AuditRecord] = []
        self.ipe = Ipe(
            keyrings=Keyrings(builtin=load_certificates([KEYS / "builtin-trusted.pem"])),
            emit=self.records.append,
            profile=PROFILES[profile],
        )
        self.ipe.load_boot_policy(BOOT_POLICY.read_bytes())
        self.files: dict[bytes, tuple[File, bytes]] = {}
        for path, content in files.items():
            data = base64.b64decode(content)
            for place, verified in ((f"/{path}", True), (f"/run/t/{path.rsplit('/', 1)[1]}", False)):
                file = File(place.encode(), "x", 1, Facts(boot_verified=verified))
                self.files[place.encode()] = file, data

    def writer(self, who: str) -> Writer:
        on_initramfs = "tmpfs" not in who
        program = File(b"/init", "x", 1, Facts(boot_verified=on_initramfs))
        return Writer(
            Opener(cap_mac_admin=who in ("root", "root, program on tmpfs")),
            Subject(1, b"init"),
            lambda: program,
            self.read_file,
        )

    def read_file(self, path: bytes) -> tuple[File, bytes]:
        if path not in self.files:
            # Directories and /proc/self/mem, whose size is 0, are nothing that kernel_read_file() reads.
            raise KernelError(errno.ENOENT if path == b"/none" else errno.EINVAL)
        return self.files[path]

    def find(self, name: str) -> LoadedPolicy:
        return next((p for p in self.ipe.policies if p.name == name), None) or self._missing(name)

    @staticmethod
    def _missing(name: str) -> LoadedPolicy:
        raise KernelError(errno.ENOENT, name)

    def write(self, path: str, data: bytes, who: str) -> int:
        match path.split("/"):
            case ["ipe", "new_policy"]:
                return self.ipe.new_policy(data, self.writer(who))
            case ["ipe", "enforce"]:
                return self.ipe.setenforce(data, self.writer(who))
            case ["ipe", "success_audit"]:
                return self.ipe.setaudit(data, self.writer(who))
            case ["ipe", "policies", name, node]:
                methods: dict[str, Callable[[LoadedPolicy, bytes, Writer], int]] = {
                    "update": self.ipe.update,
                    "active": self.ipe.setactive,
                    "delete": self.ipe.delete_policy,
                }
                return methods[node](self.find(name), data, self.writer(who))
        raise AssertionError(path)

    def read(self, path: str) -> bytes:
        match path.split("/"):
            case ["ipe", "enforce"]:
                return self.ipe.getenforce()
            case ["ipe", "success_audit"]:
                return self.ipe.getaudit()
            case ["ipe", "policies", name, node]:
                methods = {
                    "active": self.ipe.getactive,
                    "name": self.ipe.read_name,
                    "version": self.ipe.read_version,
                    "policy": self.ipe.read_policy,
                    "pkcs7": self.ipe.read_pkcs7,
                }
                return methods[node](self.find(name))
        raise AssertionError(path)

    def step(self, step: dict[str, Any]) -> object:
        path = step["path"]
        try:
            if step["op"] == "write":
                if isinstance(step["result"], dict):  # the recorded answer is that of open(2)
                    self.read(path.rsplit("/", 1)[0] + "/name")
                return [self._one_write(path, base64.b64decode(w), step["as"]) for w in step["writes"]]
            if step["op"] == "read":
                return {"data": base64.b64encode(self.read(path)).decode()}
            return {"names": sorted(p.name for p in self.ipe.policies)}
        except KernelError as error:
            answer = {"error": error.name}
            return answer | {"at": "open"} if step["result"] == answer | {"at": "open"} else answer

    def _one_write(self, path: str, data: bytes, who: str) -> dict[str, object]:
        try:
            return {"ok": self.write(path, data, who)}
        except KernelError as error:
            return {"error": error.name}


def of_the_model(step: dict[str, Any]) -> bool:
    """Whether a step is answered by the model: not by the mode bits, the virtual file system or an exec that failed."""
    if step["op"] not in ("write", "read", "list") or step.get("exec") or step["path"] not in _paths(step["path"]):
        return False
    if "uid" in step["as"]:
        return False
    if step["op"] == "list":
        return bool(step["path"] == "ipe/policies")
    if "" in step.get("writes", ()):
        return False
    write_only = step["path"].endswith(("new_policy", "update", "delete"))
    read_only = step["path"].endswith(("name", "version", "policy", "pkcs7")) and not write_only
    return not (write_only if step["op"] == "read" else read_only)


def _paths(path: str) -> tuple[str, ...]:
    return (path,) if path.startswith("ipe/") else ()


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kernel", [*KERNELS, "op-policy"])
def test_walk(kernel: str, walk: str) -> None:
    steps = load(kernel, walk)
    files = steps.pop(0)["files"] if "files" in steps[0] else {}
    model = ModelWalk(kernel, files)
    tried = 0
    for number, step in enumerate(steps, 1):
        if not of_the_model(step):
            continue
        tried += 1
        assert model.step(step) == step["result"], f"step {number}: {step['op']} {step['path']}"
        recorded = [(r["type"], normal(r["text"].encode())) for r in step["audit"] if "ipe_op=EXECUTE" not in r["text"]]
        assert [(r.type, normal(r.text)) for r in model.records] == recorded, f"step {number}: {step['path']}"
        model.records.clear()
    assert tried > 200
