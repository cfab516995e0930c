"""The inside of a rehearsal in tests: makes a root of its own, installs the filter, runs what the test sends.

Runs as a program of its own: ``tracee_main.py SOCKET_FD OPTIONS_AS_JSON``. After the filter it imports nothing.
"""

import ctypes
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ipe_emu.errors import errno_name
from ipe_emu.exec_hook.hook import rules
from ipe_emu.linux import seccomp, syscalls
from ipe_emu.linux.seccomp import Action, Rule
from ipe_emu.linux.syscalls import AT_EMPTY_PATH, AT_FDCWD, call

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
PROT = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}
AT_EXECVE_CHECK = 0x10000


def become_root() -> None:
    """Have a mount namespace of one's own, as a plain user in a user namespace of one's own."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWNS | (CLONE_NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def enter_tree(tree: str, mount_point: str, *, by_chroot: bool) -> None:
    """Make an initramfs (ramfs) of ``tree``, with a copy of its /t on a tmpfs at /run/t, and enter it."""
    call("mount", b"initramfs", mount_point.encode(), b"ramfs", 0, b"mode=755")
    shutil.copytree(tree, mount_point, symlinks=True, dirs_exist_ok=True)
    for name in ("run", "proc", "dev", "old"):
        Path(mount_point, name).mkdir()
    call("mount", b"run", f"{mount_point}/run".encode(), b"tmpfs", 0, b"mode=755")
    shutil.copytree(f"{tree}/t", f"{mount_point}/run/t", symlinks=True)
    call("mount", b"/proc", f"{mount_point}/proc".encode(), None, MS_BIND | MS_REC, None)
    call("mount", b"/dev", f"{mount_point}/dev".encode(), None, MS_BIND | MS_REC, None)
    os.chdir(mount_point)
    if by_chroot:
        os.chroot(".")
    else:
        call("pivot_root", b".", b"old")
        call("umount2", b"/old", MNT_DETACH)
    os.chdir("/")


# -- what the tests' programs use -----------------------------------------------------------------------------------


def run(function: Any) -> dict[str, Any]:
    """Run ``function`` in a child; return how it ended: an error it reported, an exit status or a signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except OSError as error:
            os.write(writer, errno_name(error.errno).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    reported = os.read(reader, 4096)
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    if reported:
        return {"error": reported.decode()}
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit": os.WEXITSTATUS(status)}


def execute(*args: str) -> dict[str, Any]:
    return run(lambda: os.execve(args[0], args, {}))


def _vector(strings: tuple[bytes, ...]) -> Any:
    return (ctypes.c_char_p * (len(strings) + 1))(*strings, None)


def execveat(directory: int, path: bytes, *args: bytes, flags: int = 0) -> int:
    return call("execveat", directory, path, _vector(args or (path,)), _vector(()), flags)


def protection(letters: str) -> int:
    value = 0
    for letter in letters:
        value |= PROT.get(letter, 0)
    return value


def map_memory(path: str, letters: str) -> int:
    """mmap(2) of a file, or of nothing for ``-``; the letter S makes it shared. Return the address."""
    shared = mmap.MAP_SHARED if "S" in letters else mmap.MAP_PRIVATE
    if path == "-":
        return mmap_(4096, protection(letters), shared | mmap.MAP_ANONYMOUS, -1)
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap_(4096, protection(letters), shared, fd)
    finally:
        os.close(fd)


def mmap_(length: int, prot: int, flags: int, fd: int) -> int:
    return call("mmap", 0, length, prot, flags, fd, 0)


def mprotect(address: int, length: int, prot: int) -> int:
    return call("mprotect", address, length, prot)


def memfd_of(path: str, name: str = "m", flags: int = 0) -> int:
    fd = os.memfd_create(name, flags)
    os.write(fd, Path(path).read_bytes())
    return fd


def put(path: str, content: bytes, mode: int = 0o755) -> None:
    """Write a file anew, so that nobody has it open."""
    Path(path).unlink(missing_ok=True)
    Path(path).write_bytes(content)
    Path(path).chmod(mode)


def outcome(function: Any) -> dict[str, Any]:
    """Call ``function``; return an error it raises as the recorder did, else ok."""
    try:
        function()
    except OSError as error:
        return {"error": errno_name(error.errno)}
    return {"ok": 0}


# The tests' statements see all names of this module; these are here for them alone, imported while there is a root.
FOR_STATEMENTS = (AT_EMPTY_PATH, AT_FDCWD, resource, struct, syscalls, threading, time)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    become_root()
    if options.get("tree"):
        enter_tree(options["tree"], options["mount_point"], by_chroot=options.get("chroot", False))
    for source in options.get("before", ()):
        exec(source, globals())
    call("prctl", PR_SET_NAME, b"init", 0, 0, 0)
    if options.get("bare"):
        channel.send(b"B")
    else:
        trapped = [Rule(name, Action.NOTIFY) for name in options.get("traps", ())]
        listener = seccomp.install([*rules(securityfs=options.get("securityfs", False)), *trapped])
        socket.send_fds(channel, [b"L"], [listener])
        os.close(listener)
    channel.recv(1)
    with channel.makefile("rw") as lines:
        for line in lines:
            names = dict(globals())
            try:
                exec(json.loads(line), names)
                answer = {"value": names.get("result")}
            except BaseException:
                answer = {"traceback": traceback.format_exc()}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
