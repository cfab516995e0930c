"""Do the sequences of a batch with system calls of this process; the same program for a kernel and for the emulator.

usage: python -m tests.conformance.driver BATCH ANSWERS SECURITYFS (netlink | AUDIT_LOG) [executing]

BATCH and ANSWERS are JSON: a list of sequences of steps, and for each step its result and its audit records.
With ``executing``, there are places on /mnt from which programs are executed.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH108, PTH112, PTH208, PTH211 - system calls as they are
# Each step is one system call; pathlib would make several.

import array
import base64
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_char_p
from pathlib import Path
from typing import Any

from ipe_emu.linux.syscalls import AT_EMPTY_PATH, call
from tests.conformance import media
from tests.conformance.audit import AuditSource, KernelAudit, LogAudit
from tests.conformance.media import SEALABLE
from tests.exec_hook.fsverity_steps import enable, measured
from tests.securityfs.acting import Actor, encoded, failed
from tests.securityfs.identities import become

Step = dict[str, Any]
Answer = dict[str, Any]

SCRATCH = "/mnt/scratch"
NEW = f"{SEALABLE}/new"
MODES = {"ipe/new_policy": 0o200, "ipe/enforce": 0o600, "ipe/success_audit": 0o600, "ipe": 0o755, "ipe/policies": 0o755}
SECONDS = 60.0
#: A printed script, if a machine is to run one, and what it prints.
SCRIPT, PRINTED = "script.py", "printed"
AT_EXECVE_CHECK = 0x10000
MS_NOEXEC, MS_BIND = 8, 4096


class Driver(Actor):
    """Does steps, each as whom it says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.modes = {path: (root / path).stat().st_mode & 0o7777 for path in MODES}

    def perform(self, step: Step) -> Any:
        """Do a step, in a child that gives up what ``as`` says; a descriptor it opens comes back."""
        who = step.get("as", "root")
        if who == "root" and "auid" not in step:
            return self.act(step)
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                if "auid" in step:
                    Path("/proc/self/loginuid").write_text(str(step["auid"]))
                become(who)
                answer = self.act(step)
                opened = [self.descriptors[step["fd"]]] if step["op"] == "fd_open" and "ok" in answer else []
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened))] if opened else []
                theirs.sendmsg([b" "], ancillary)
                theirs.sendall(json.dumps(answer).encode())
            os._exit(0)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        said = b""
        while piece := ours.recv(1 << 16):
            said += piece
        ours.close()
        os.waitpid(child, 0)
        if step["op"] == "fd_close":
            self.act(step)  # the child closed a copy
        if fds:
            self._keep(step["fd"], fds[0])
        return json.loads(said) if said else {"error": "the step's process died"}

    def _keep(self, name: str, fd: int) -> None:
        if name in self.descriptors:
            os.close(self.descriptors[name])
        self.descriptors[name] = fd

    # -- one step ---------------------------------------------------------------------------------------------------

    def do_reset(self, step: Step) -> Any:
        """Bring the machine into a state that is known: one active policy, ``enforce`` 1, ``success_audit`` 0."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()
        for path, mode in self.modes.items():
            os.chown(self.root / path, 0, 0)
            os.chmod(self.root / path, mode)
            if path not in ("ipe", "ipe/policies"):
                os.truncate(self.root / path, 0)
        self._put("ipe/new_policy", base64.b64decode(step["data"]))
        self._put(f"ipe/policies/{step['name']}/active", b"1")
        for name in os.listdir(self.root / "ipe/policies"):
            if name != step["name"]:
                self._put(f"ipe/policies/{name}/delete", b"1")
        self._put("ipe/enforce", step["enforce"].encode())
        self._put("ipe/success_audit", b"0")
        if os.path.isdir(NEW):
            for name in os.listdir(NEW):
                os.unlink(f"{NEW}/{name}")
        return {"ok": 0}

    def _put(self, path: str, data: bytes) -> None:
        fd = os.open(self.root / path, os.O_WRONLY)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    def do_load(self, step: Step) -> Any:
        """Write to new_policy; what that loaded is looked at and deleted again."""
        before = set(os.listdir(self.root / "ipe/policies"))
        try:
            fd = os.open(self.root / "ipe/new_policy", os.O_WRONLY)
            try:
                answer: Answer = {"ok": os.write(fd, base64.b64decode(step["data"]))}
            finally:
                os.close(fd)
        except OSError as error:
            answer = failed(error)
        for name in set(os.listdir(self.root / "ipe/policies")) - before:
            directory = self.root / "ipe/policies" / name
            answer["name"] = (directory / "name").read_bytes().decode("latin-1")
            answer["version"] = (directory / "version").read_text()
            (directory / "delete").write_bytes(b"1")
        return answer

    def do_together(self, step: Step) -> Any:
        """Let several processes do the same at once; their answers, sorted."""
        ready, go = os.pipe()
        reader, writer = os.pipe()
        children = []
        for _ in range(step["writers"]):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(ready, 1)  # ends when they all are there
                os.write(writer, json.dumps(self.perform(step["each"])).encode() + b"\n")
                os._exit(0)
            children.append(child)
        for fd in (ready, go, writer):
            os.close(fd)
        answered = sorted(_all(reader).splitlines())
        for child in children:
            os.waitpid(child, 0)
        return {"each": [json.loads(line) for line in answered]}

    def do_chmod(self, step: Step) -> Any:
        os.chmod(self.path(step), step["mode"])
        return {"ok": 0}

    def do_chown(self, step: Step) -> Any:
        os.chown(self.path(step), step["uid"], step["uid"])
        return {"ok": 0}

    def do_truncate(self, step: Step) -> Any:
        os.truncate(self.path(step), step["size"])
        return {"ok": 0}

    def on_descriptor(self, name: str, step: Step) -> Any:
        fd = self.descriptors.get(step["fd"], 987654)
        if name == "fd_pwrite":
            return {"ok": os.pwrite(fd, base64.b64decode(step["data"]), step["offset"])}
        if name == "fd_pread":
            return encoded(os.pread(fd, step["length"], step["offset"]))
        if name == "fd_writev":
            return {"ok": os.writev(fd, [base64.b64decode(data) for data in step["writes"]])}
        if name == "fd_list":
            return {"names": sorted(os.listdir(fd))}
        if name == "fd_sync":
            os.fsync(fd)
            return {"ok": 0}
        if name == "fd_chmod":
            os.fchmod(fd, step["mode"])
            return {"ok": 0}
        return super().on_descriptor(name, step)

    # -- what is sealed ---------------------------------------------------------------------------------------------

    def do_seal(self, step: Step) -> Any:
        """Seal a file by fs-verity."""
        seal(step)
        return {"ok": 0}

    def do_measure(self, step: Step) -> Any:
        fd = os.open(step["file"], os.O_RDONLY)
        try:
            return {"ok": measured(fd)}
        finally:
            os.close(fd)

    def do_alter(self, step: Step) -> Any:
        """Change a file, its mode, or its name."""
        path, how = step["file"], step["how"]
        if how == "append":
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                return {"ok": os.write(fd, b"#\n")}
            finally:
                os.close(fd)
        {
            "truncate": lambda: os.truncate(path, 3),
            "chmod": lambda: os.chmod(path, step["mode"]),
            "utime": lambda: os.utime(path),
            "rename": lambda: os.rename(path, step["to"]),
            "link": lambda: os.link(path, step["to"]),
            "unlink": lambda: os.unlink(path),
        }[how]()
        return {"ok": 0}

    # -- what is executed -------------------------------------------------------------------------------------------

    def do_shell(self, step: Step) -> Any:
        """Run a shell script that has the nodes at its feet and its files in the scratch directory."""
        for name, data in step.get("files", {}).items():
            Path(SCRATCH, name).write_bytes(base64.b64decode(data))
        done = subprocess.run(
            [*step["shell"], step["script"]], cwd=self.root / "ipe", capture_output=True, timeout=SECONDS, check=False,
            stdin=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "S": SCRATCH},
        )  # fmt: skip
        return {
            "status": done.returncode,
            "stdout": done.stdout.decode("latin-1"),
            "stderr": done.stderr.decode("latin-1"),
        }

    def do_carry(self, step: Step) -> Any:
        """Copy between a node and a file, or a pipe for splice(2), without the process's memory."""
        Path(SCRATCH, "f").write_bytes(base64.b64decode(step["files"]["f"]))
        opened = [os.open(self.path(step), os.O_WRONLY if step["into"] else os.O_RDONLY)]
        try:
            if step["call"] == "splice":
                opened += os.pipe()
                os.write(opened[2], b"1")
                other = opened[1] if step["into"] else opened[2]
            else:
                opened.append(os.open(f"{SCRATCH}/f", os.O_RDWR))
                other = opened[1]
            source, target = (other, opened[0]) if step["into"] else (opened[0], other)
            if step["call"] == "sendfile":
                return {"ok": os.sendfile(target, source, None, 100)}
            return {"ok": getattr(os, step["call"])(source, target, 100)}
        finally:
            for fd in opened:
                os.close(fd)

    def do_execve(self, step: Step) -> Any:
        return ended(lambda: os.execve(step["file"], step.get("argv", [step["file"]]), {}))

    def do_execveat(self, step: Step) -> Any:
        """By a descriptor of the file, or with AT_EXECVE_CHECK."""
        flags = AT_EMPTY_PATH | (AT_EXECVE_CHECK if step.get("check") else 0)

        def go() -> None:
            fd = os.open(step["file"], os.O_RDONLY)
            os.set_inheritable(fd, step.get("inheritable", True))
            execveat(fd, b"", flags, step["file"].encode())

        return ended(go)

    def do_memfd(self, step: Step) -> Any:
        def go() -> None:
            fd = os.memfd_create("copy", 0)
            os.write(fd, Path(step["file"]).read_bytes())
            execveat(fd, b"", AT_EMPTY_PATH, b"copy")

        return ended(go)

    def do_mmap(self, step: Step) -> Any:
        """Map a file, or nothing, and change the protection after it: ``prot`` and ``then`` are PROT_ bits."""

        def go() -> None:
            fd = os.open(step["file"], os.O_RDONLY) if step.get("file") else -1
            flags = step["flags"] | (0 if fd >= 0 else 0x20)
            address = call("mmap", 0, 4096, step["prot"], flags, fd, 0)
            for protection in step.get("then", ()):
                call("mprotect", address, 4096, protection)

        return ended(go)

    def do_module(self, step: Step) -> Any:
        def go() -> None:
            fd = os.open(step["file"], os.O_RDONLY)
            if step.get("from_buffer"):
                data = os.read(fd, 1 << 24)
                call("init_module", data, len(data), b"")
            else:
                call("finit_module", fd, b"", step.get("flags", 0))

        return ended(go)

    def do_copy(self, step: Step) -> Any:
        """Put a copy of a file somewhere (it is a new file then)."""
        target = Path(step["to"])
        target.unlink(missing_ok=True)
        target.write_bytes(Path(step["file"]).read_bytes())
        target.chmod(step.get("mode", 0o755))
        return {"ok": 0}


def seal(step: Step) -> None:
    fd = os.open(step["file"], step.get("flags", os.O_RDONLY))
    try:
        enable(
            fd, algorithm=step["algorithm"], block=step["block"], salt=step["salt"].encode(),
            signature=base64.b64decode(step["signature"]),
        )  # fmt: skip
    finally:
        os.close(fd)


def ended(function: Callable[[], object]) -> Answer:
    """Call ``function`` in a child; how that ended, and what it printed."""
    reader, writer = os.pipe()
    output, printed = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            function()
            os.write(writer, b"ok")
        except OSError as error:
            os.write(writer, errno.errorcode.get(error.errno or 0, "?").encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    os.close(printed)
    reported, said = _all(reader), _all(output)
    status = os.waitpid(child, 0)[1]
    if reported == b"ok":
        return {"ok": 0}
    if reported:
        return {"error": reported.decode()}
    how = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit": os.WEXITSTATUS(status)}
    return how | {"printed": said.decode("latin-1")}


def _all(fd: int) -> bytes:
    with open(fd, "rb") as stream:
        return stream.read()


def execveat(directory: int, path: bytes, flags: int, name: bytes) -> None:
    call("execveat", directory, path, (c_char_p * 2)(name, None), (c_char_p * 1)(None), flags)


def attempt(driver: Driver, step: Step) -> Any:
    try:
        return driver.perform(step)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": repr(error)}


def run(batch: list[list[Step]], root: Path, audit: AuditSource) -> list[list[Answer]]:
    driver = Driver(root)
    answers: list[list[Answer]] = []
    for sequence in batch:
        results = []
        for step in sequence:
            results.append(attempt(driver, step))
            audit.step_done()
        answers.append([{"result": result} for result in results])
        for step, answer, records in zip(sequence, answers[-1], audit.of_steps(), strict=True):
            answer["audit"] = sorted(records) if step["op"] == "together" else records
    return answers


def make_places(work: Path, *, on_kernel: bool) -> None:
    """The places that decisions are about, beside /mnt/initramfs which is there already."""
    for name in ("tmpfs", "upper", "bind", "noexec", "links"):
        os.mkdir(f"/mnt/{name}")
    for name in ("tmpfs", "scratch", "upper"):
        call("mount", b"tmpfs", f"/mnt/{name}".encode(), b"tmpfs", 0, b"mode=755")
    call("mount", b"tmpfs", b"/mnt/noexec", b"tmpfs", MS_NOEXEC, b"mode=755")
    call("mount", b"/mnt/initramfs/bin", b"/mnt/bind", None, MS_BIND, None)
    make_overlay("/mnt/initramfs", "overlay", changed=["bin/script"])
    for name in os.listdir("/mnt/initramfs/bin"):
        original = f"/mnt/initramfs/bin/{name}"
        for place in ("tmpfs", "noexec"):
            Path(f"/mnt/{place}/{name}").write_bytes(Path(original).read_bytes())
            os.chmod(f"/mnt/{place}/{name}", Path(original).stat().st_mode & 0o777)
        os.symlink(original, f"/mnt/links/{name}")
    os.symlink("/mnt/tmpfs/true", "/mnt/links/via_tmpfs")
    make_volumes(media.volumes(work), on_kernel=on_kernel)
    make_seals(work, media.seals(work), on_kernel=on_kernel)


def make_overlay(lower: str, name: str, *, changed: list[str]) -> None:
    """An overlay on /mnt; of the files that are ``changed``, copies are in its upper layer."""
    for directory in (name, f"upper/{name}", f"upper/{name}/files", f"upper/{name}/work"):
        os.mkdir(f"/mnt/{directory}")
    layers = f"lowerdir={lower},upperdir=/mnt/upper/{name}/files,workdir=/mnt/upper/{name}/work"
    call("mount", b"overlay", f"/mnt/{name}".encode(), b"overlay", 0, layers.encode())
    for path in changed:
        os.utime(f"/mnt/{name}/{path}")


def make_volumes(volumes: tuple[media.Volume, ...], *, on_kernel: bool) -> None:
    for number, volume in enumerate(volumes):
        if on_kernel:  # the emulator has mounted them already
            volume.mount(2 * number)
    if volumes:
        make_overlay("/mnt/dmvs", "overlay-dmvs", changed=["bin/script"])


def make_seals(work: Path, seals: list[Step], *, on_kernel: bool) -> None:
    if not seals:
        return
    if on_kernel:
        media.mount_sealable(work)
        trust_for_fsverity((work / media.CERTIFICATE).read_bytes())
    for step in seals:
        seal(step)
    os.mkdir("/mnt/bind-fsv")
    call("mount", f"{SEALABLE}/layers".encode(), b"/mnt/bind-fsv", None, MS_BIND, None)
    make_overlay(f"{SEALABLE}/layers", "overlay-fsv", changed=["sha256/bin/true", "sha256s/bin/busybox"])


def trust_for_fsverity(certificate: bytes) -> None:
    """Put a certificate into the kernel's keyring for fs-verity."""
    keyring = next(line for line in Path("/proc/keys").read_text().splitlines() if " .fs-verity" in line)
    call("add_key", b"asymmetric", b"", certificate, len(certificate), int(keyring.split()[0], 16))


def main(arguments: list[str]) -> None:
    batch, answers, root, source, *executing = arguments
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    work, on_kernel = Path(batch).parent, source == "netlink"
    audit: AuditSource = KernelAudit(os.getpid()) if on_kernel else LogAudit(Path(source))
    Path(SCRATCH).mkdir()
    if executing:
        make_places(work, on_kernel=on_kernel)
    if (script := work / SCRIPT).exists():
        with (work / PRINTED).open("wb") as printed:
            subprocess.run([sys.executable, script, root], check=False, stdout=printed, timeout=SECONDS)
    done = run(json.loads(Path(batch).read_text()), Path(root), audit)
    Path(answers).write_text(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1:])
