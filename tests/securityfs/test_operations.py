"""Requests as pyfuse3 hands them over, without a mount."""

import errno
import os
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pyfuse3
import pytest
import trio
from attrs import evolve

from ipe_emu.audit import AuditRecord
from ipe_emu.errors import KernelError
from ipe_emu.integrity.declared import Declared
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.linux import procfs
from ipe_emu.lsm import Ipe
from ipe_emu.profiles import PROFILES
from ipe_securityfs import operations
from ipe_securityfs.clients import Credentials
from ipe_securityfs.operations import MountedAs, Operations
from ipe_securityfs.tree import Directory, File, Tree
from tests.securityfs.policies import policy
from tests.vectors import BOOT_POLICY, KEYS

pytestmark = pytest.mark.timeout(60)


class Machine:
    """An emulated machine whose requests all come from this thread, which waits in no write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, profile: str = "linux-7.3", **credentials: Any) -> None:
        monkeypatch.setattr(pyfuse3, "notify_store", lambda *_: None)
        monkeypatch.setattr(operations, "_SECONDS_TO_SEE_WRITER", 0.1)
        self.records: list[AuditRecord] = []
        keys = load_certificates([KEYS / "builtin-trusted.pem"])
        self.ipe = Ipe(Keyrings(builtin=keys), emit=self.records.append, profile=PROFILES[profile])
        self.ipe.load_boot_policy(BOOT_POLICY.read_bytes())
        self.tree = Tree(self.ipe, lsm_list=b"ipe")
        whose = Credentials(**({"user_namespaces": frozenset({procfs.namespace("self", "user")})} | credentials))
        self.operations = Operations(self.ipe, self.tree, MountedAs(whose, Declared(())))
        self.context = cast("pyfuse3.RequestContext", SimpleNamespace(pid=threading.get_native_id(), uid=0, gid=0))

    def node(self, path: str) -> File:
        node: object = self.tree.root
        for name in path.split("/"):
            assert isinstance(node, Directory)
            node = node.lookup(name.encode())
        assert isinstance(node, File)
        return node

    def run(self, action: Callable[[], Awaitable[Any]]) -> Any:
        """What a request answers; for one that fails, minus the errno."""

        async def main() -> Any:
            try:
                return await action()
            except pyfuse3.FUSEError as error:
                return -error.errno

        return trio.run(main)

    def open(self, path: str, flags: int = os.O_RDWR) -> Any:
        ino = pyfuse3.InodeT(self.node(path).ino)
        return self.run(lambda: self.operations.open(ino, pyfuse3.FlagT(flags), self.context))

    def write(self, path: str, data: bytes) -> Any:
        info = self.open(path, os.O_WRONLY)
        return self.run(lambda: self.operations.write(info.fh, 0, data))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.needs("root")
def test_a_write_that_nobody_is_seen_to_make_is_refused_and_audited(machine: Machine) -> None:
    assert machine.write("ipe/new_policy", policy("Unseen")) == -errno.EACCES
    assert [record.text for record in machine.records][-1].endswith(b"res=0 errno=-13")
    assert machine.write("ipe/enforce", b"0") == -errno.EACCES
    assert machine.ipe.enforce
    assert [loaded.name for loaded in machine.ipe.policies] == ["AllowInitramfs"]


def test_without_the_capability_the_answer_is_eperm_whoever_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a process in no namespace of the machine's, and of one that this pid namespace does not show."""
    stranger = Machine(monkeypatch, user_namespaces=frozenset({1}))
    assert stranger.write("ipe/new_policy", policy("Stranger")) == -errno.EPERM
    assert stranger.write("ipe/enforce", b"0") == -errno.EPERM
    unseen = Machine(monkeypatch)
    unseen.context = cast("pyfuse3.RequestContext", SimpleNamespace(pid=0, uid=0, gid=0))
    assert unseen.write("ipe/enforce", b"0") == -errno.EPERM
    assert unseen.ipe.enforce


def test_where_yama_forbids_to_look_the_reason_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "not permitted")

    real = procfs.record
    monkeypatch.setattr(procfs, "record", lambda pid, name: forbidden() if name == "syscall" else real(pid, name))
    monkeypatch.setattr(Credentials, "_has_mac_admin", lambda *_: True)
    assert machine.write("ipe/enforce", b"0") == -errno.EACCES
    assert "kernel.yama.ptrace_scope" in caplog.text


def test_a_defect_of_the_model_is_eio_and_no_end_of_the_mount(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*_: object) -> NoReturn:
        raise RecursionError

    node = machine.node("ipe/enforce")
    node.read = node.write = defect
    monkeypatch.setattr(operations, "waits_in_plain_write", lambda *_: True)
    assert machine.write("ipe/enforce", b"0") == -errno.EIO
    info = machine.open("ipe/enforce", os.O_RDONLY)
    assert machine.run(lambda: machine.operations.read(info.fh, 0, 10)) == -errno.EIO
    assert caplog.text.count("this is a defect of ipe-emu") == 2


def test_what_securityfs_lacks(machine: Machine) -> None:
    ops, root, context = machine.operations, pyfuse3.ROOT_INODE, machine.context
    name, mode = pyfuse3.FileNameT(b"x"), pyfuse3.ModeT(0o644)
    answers = {
        "create": lambda: ops.create(root, name, mode, pyfuse3.FlagT(0), context),
        "mknod of a file": lambda: ops.mknod(root, name, pyfuse3.ModeT(0o100644), 0, context),
        "mknod of a fifo": lambda: ops.mknod(root, name, pyfuse3.ModeT(0o010644), 0, context),
        "mkdir": lambda: ops.mkdir(root, name, mode, context),
        "symlink": lambda: ops.symlink(root, name, name, context),
        "link": lambda: ops.link(root, root, name, context),
        "rename": lambda: ops.rename(root, name, root, name, pyfuse3.FlagT(0), context),
        "unlink": lambda: ops.unlink(root, name, context),
        "rmdir": lambda: ops.rmdir(root, name, context),
        "a missing name": lambda: ops.lookup(root, name, context),
        "a long name": lambda: ops.lookup(root, pyfuse3.FileNameT(b"x" * 256), context),
        "a name of full length": lambda: ops.lookup(root, pyfuse3.FileNameT(b"x" * 255), context),
        "a name in a file": lambda: ops.lookup(pyfuse3.InodeT(machine.node("lsm").ino), name, context),
        "fsync": lambda: ops.fsync(pyfuse3.FileHandleT(1), False),
        "an unknown inode": lambda: ops.getattr(pyfuse3.InodeT(999), context),
    }
    expected = {
        "create": "EACCES", "mknod of a file": "EACCES", "mknod of a fifo": "EPERM", "mkdir": "EPERM",
        "symlink": "EPERM", "link": "EPERM", "rename": "EPERM", "unlink": "EPERM", "rmdir": "EPERM",
        "a missing name": "ENOENT", "a long name": "ENAMETOOLONG", "a name of full length": "ENOENT",
        "a name in a file": "ENOTDIR", "fsync": "EINVAL", "an unknown inode": "ENOENT",
    }  # fmt: skip
    assert {what: errno.errorcode[-machine.run(ask)] for what, ask in answers.items()} == expected
    assert machine.open("ipe/enforce", os.O_RDONLY | os.O_DIRECT) == -errno.EINVAL
    info = machine.open("lsm", os.O_RDWR)
    assert machine.run(lambda: ops.write(info.fh, 0, b"x")) == -errno.EINVAL
    info = machine.open("ipe/new_policy", os.O_RDWR)
    assert machine.run(lambda: ops.read(info.fh, 0, 10)) == -errno.EINVAL


def test_no_size_shows_where_an_exec_hook_answers_sendfile(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(pyfuse3, "notify_store", lambda *arguments: shown.append(arguments))
    node = pyfuse3.InodeT(machine.node("ipe/enforce").ino)

    def size() -> int:
        return int(machine.run(lambda: machine.operations.getattr(node, machine.context)).st_size)

    machine.open("ipe/enforce", os.O_RDONLY)
    assert (len(shown), size()) == (1, 1)
    under_run = Machine(monkeypatch)
    monkeypatch.setattr(pyfuse3, "notify_store", lambda *arguments: shown.append(arguments))
    under_run.operations.mounted_as = evolve(under_run.operations.mounted_as, size_trick=False)
    under_run.open("ipe/enforce", os.O_RDONLY)
    machine = under_run
    assert (len(shown), size()) == (1, 0)


def test_errors_of_the_model_keep_their_errno(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> NoReturn:
        raise KernelError(errno.EKEYREJECTED, "for a test")

    machine.node("ipe/enforce").write = refused
    monkeypatch.setattr(operations, "waits_in_plain_write", lambda *_: True)
    assert machine.write("ipe/enforce", b"0") == -errno.EKEYREJECTED
