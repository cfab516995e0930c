"""A supervisor that is killed while one of its threads waits for the supervisor's own mount: it ends all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.exec_hook.running import LIMIT
from tests.rootless import ROOT, as_plain_user

pytestmark = [pytest.mark.needs("fuse", "user-namespaces"), pytest.mark.timeout(100)]

#: Serves its mount until a request comes that it does not answer, and is killed then.
SUPERVISOR = f"""
import os, signal, struct, sys, threading
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}]
from ipe_emu.exec_hook import fuse_abort
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.exec_hook.mount_plan import SecurityFs
from ipe_emu.linux import mounts, namespaces
from ipe_emu.linux.namespaces import IdMap, IdRange, Namespace

if os.geteuid():
    uid, gid = os.geteuid(), os.getegid()
    namespaces.unshare(Namespace.USER)
    namespaces.write_maps("self", IdMap((IdRange(0, uid, 1),), (IdRange(0, gid, 1),), setgroups=False))
ours, theirs = Channel.pair()
ending, end = os.pipe()
if os.fork() == 0:
    namespaces.unshare(Namespace.MOUNT)
    mounts.make_private()
    fuse, session = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC), Path("/sys")
    SecurityFs(fuse, session).execute()
    fuse_abort.start(ending, session)
    root = os.open(session, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    theirs.send("fuse", {{}}, [fuse, root])
    os._exit(0)
fuse, root = ours.receive().fds  # the agent ends, and what it started stays
request = os.read(fuse, 1 << 20)  # FUSE_INIT
unique = struct.unpack_from("=IIQ", request)[2]
answer = struct.pack("=IIIIHHI", 7, 31, 0, 0, 12, 10, 4096).ljust(64, b"\\0")
os.write(fuse, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
threading.Thread(target=os.stat, args=(f"/proc/self/fd/{{root}}",)).start()
os.read(fuse, 1 << 20)  # FUSE_GETATTR
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_supervisor_that_is_killed_ends(tmp_path: Path) -> None:
    for command in ([sys.executable, "-c", SUPERVISOR], as_plain_user([sys.executable, "-c", SUPERVISOR], tmp_path)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert (done.stdout, done.returncode) == ("asked\n", -9), done.stderr
