"""The nodes of a rehearsed machine: what they show and record is what the machine itself would."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.exec_hook.running import Runner, runner

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain-user")


def test_records_number_processes_as_the_machine_does(emu: Runner) -> None:
    """Those on behalf of a writer, and those of the exec hook."""
    log = emu.place / "audit.log"
    script = (
        "echo $$; cd /sys/kernel/security/ipe; echo 1 > success_audit; echo 0 > enforce;"
        " printf 'policy_name=Written policy_version=1.0.0\\nDEFAULT action=ALLOW\\n' > new_policy; exec true"
    )
    done = emu.shell(script, *emu.with_policy(), "--audit-log", str(log))
    assert done.returncode == 0, done.stderr
    own = done.stdout.strip()
    records = log.read_text().splitlines()
    by_writer, by_hook = (
        set(re.findall(r" pid=(\d+) ", "\n".join(line for line in records if what in line)))
        for what in ("ipe_hook=POLICY_LOAD", 'comm="sh" path="/usr/bin/true"')
    )
    assert by_writer == by_hook == {own}, records


def test_records_number_users_as_the_machine_does(emu: Runner) -> None:
    """Whatever the ids of the sandbox are outside. On a kernel without audit nobody logs in."""
    log = emu.place / "audit.log"
    script = (
        "if [ -e /proc/self/loginuid ]; then echo 0 > /proc/self/loginuid; cat /proc/self/loginuid;"
        " else echo 4294967295; fi;"
        " echo 0 > /sys/kernel/security/ipe/enforce"
    )
    done = emu.shell(script, *emu.with_policy(), "--audit-log", str(log))
    assert done.returncode == 0, done.stderr
    assert re.findall(r" auid=(\d+) ", log.read_text()) == [done.stdout.strip()]


def test_nobody_sees_a_size(emu: Runner) -> None:
    """sendfile(2) is refused here, and so no reader needs to be shown one."""
    done = emu.shell(
        "exec 3< /sys/kernel/security/ipe/enforce; stat -L -c %s /sys/kernel/security/ipe/enforce; cat <&3"
    )
    assert done.stdout == "0\n1", done.stderr


def test_a_path_may_name_the_writer_itself(emu: Runner) -> None:
    """/proc/self is the writer's, whatever this machine's own /proc calls it."""
    done = emu.shell("printf /proc/self/status | tee /sys/kernel/security/ipe/new_policy", *emu.with_policy())
    assert "Invalid argument" in done.stderr  # it is there, and looks empty


# Each answer is what the call returned, or the name of its errno.
CALLS_FUSE_DOES_NOT_PASS_ON = """
import errno, os, sys
ipe = "/sys/kernel/security/ipe/"
def outcome(name, mode, act):
    fd = os.open(ipe + name, mode)
    try:
        return act(fd)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(fd)
def nothing(fd):
    return os.write(fd, b"")
def none(fd):
    return len(os.read(fd, 0))
def flagged(fd, length=4):
    return os.preadv(fd, [bytearray(length)], 0, os.RWF_NOWAIT)
written = "enforce", "new_policy", "policies/Initramfs/delete", "../lsm"
print(*(outcome(name, os.O_WRONLY, nothing) for name in written))
print(*(outcome(name, os.O_RDONLY, none) for name in ("enforce", "new_policy", "policies/Initramfs/pkcs7", "../lsm")))
print(*(outcome(name, os.O_RDONLY, flagged) for name in ("enforce", "new_policy", "policies/Initramfs/name")))
print(outcome("enforce", os.O_RDONLY, lambda fd: flagged(fd, 0)), outcome("enforce", os.O_RDONLY, nothing),
      outcome("enforce", os.O_WRONLY, none), outcome("enforce", os.O_WRONLY, lambda fd: os.pwrite(fd, b"", 7)))
reader, writer = os.pipe()
print(os.write(writer, b""), len(os.read(reader, 0)), len(os.pread(os.open("/proc/self/exe", 0), 0, 0)))
"""


def test_calls_that_fuse_does_not_pass_on(emu: Runner) -> None:
    done = emu.run("run", "--boot-policy", emu.with_policy()[1], "--boot-verified", "/", "--", sys.executable, "-c",
                   CALLS_FUSE_DOES_NOT_PASS_ON)  # fmt: skip
    assert done.stdout.splitlines() == [
        "EINVAL EBADMSG EINVAL EINVAL",
        "0 EINVAL ENOENT 0",
        "ENOTSUP EINVAL ENOTSUP",  # EOPNOTSUPP by its other name
        "0 EBADF EBADF EINVAL",
        "0 0 0",
    ], done.stderr


POSITIONS_AND_POLLING = """
import errno, os, select
root = "/sys/kernel/security/"
def outcome(act):
    try:
        return act()
    except OSError as error:
        return errno.errorcode[error.errno]
names = "ipe/enforce", "ipe/policies/Initramfs/name", "lsm", "ipe", "/proc/self/maps"
opened = [os.open(os.path.join(root, name), os.O_RDONLY) for name in names]
epoll = select.epoll()
print(*(outcome(lambda: os.lseek(fd, 0, os.SEEK_CUR)) for fd in opened))
print(*(outcome(lambda: os.lseek(opened[0], *where)) for where in ((0, os.SEEK_SET), (0, os.SEEK_END), (0, 9))))
print(*(outcome(lambda: epoll.register(fd, select.EPOLLIN)) for fd in opened))
print(os.pread(opened[0], 5, 0), os.read(opened[0], 5), outcome(lambda: epoll.register(os.pipe()[0])))
path = os.open(root + "ipe/enforce", os.O_PATH)
print(outcome(lambda: os.lseek(path, 0, os.SEEK_CUR)), outcome(lambda: epoll.register(path, select.EPOLLIN)))
try:
    open(root + "ipe/enforce", "r+")
except OSError as error:
    print(error)
print(open(root + "ipe/enforce", "w").write("1"))
"""


def test_positions_and_polling(emu: Runner) -> None:
    """Nodes of IPE have no position, ``lsm`` has one; no file of securityfs can be polled."""
    done = emu.run("run", "--boot-policy", emu.with_policy()[1], "--boot-verified", "/", "--", sys.executable, "-c",
                   POSITIONS_AND_POLLING)  # fmt: skip
    assert done.stdout.splitlines() == [
        "ESPIPE ESPIPE 0 0 0",
        "ESPIPE ESPIPE EINVAL",
        "EPERM EPERM EPERM EPERM EPERM",
        "b'1' b'1' None",
        "EBADF EBADF",
        "File or stream is not seekable.",
        "1",
    ], done.stderr


def test_nothing_is_written_without_the_capability(emu: Runner) -> None:
    write = f"{sys.executable} -c 'import os; os.write(1, b\"\")'"
    done = emu.shell(f"setpriv --bounding-set -mac_admin {write} > /sys/kernel/security/ipe/enforce")
    assert "PermissionError" in done.stderr
