"""One write(2) is one policy, whoever writes it and however; what the kernel refuses is refused."""

import ctypes
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipe_emu.linux import syscalls
from tests.securityfs.conftest import Mount
from tests.securityfs.emulator import Emulator, mounted
from tests.securityfs.policies import policy, signed, text
from tests.securityfs.writing import write

pytestmark = [pytest.mark.needs("fuse", "root", "busybox"), pytest.mark.timeout(60)]

EPERM, EINVAL, ENOMEM, EMSGSIZE, EBADMSG, EACCES = (
    getattr(errno, name) for name in ("EPERM", "EINVAL", "ENOMEM", "EMSGSIZE", "EBADMSG", "EACCES")
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with mounted(tmp_path_factory.mktemp("writers") / "m") as emulator:
        yield emulator


def python(code: str, *arguments: str | Path) -> int:
    """Run a few lines that write; return 0 or the errno they failed with."""
    program = (
        "import os, sys, threading\n"
        "try:\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "except OSError as e: sys.exit(e.errno)\n"
    )
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], timeout=30, check=False).returncode


# {file} holds a signed policy that fits in any writer's block, and is written to {node}.
WRITERS = {
    "cat": "cat {file} > {node}",
    "busybox cat": "busybox cat {file} > {node}",
    "cp": "cp {file} {node}",
    "busybox cp": "busybox cp {file} {node}",
    "dd": "dd if={file} of={node} bs=64k status=none",
    "busybox dd": "busybox dd if={file} of={node} bs=64k 2>&-",
    "tee": "tee {node} < {file} > /dev/null",
    "descriptor of the shell": "exec 3> {node}; cat {file} >&3",
    "redirected group": "{{ cat {file}; }} > {node}",
    "python": f"{sys.executable} -c \"import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read())\""
    " {file} {node}",
    "python shutil": f'{sys.executable} -c "import shutil, sys; shutil.copyfile(*sys.argv[1:])" {{file}} {{node}}',
    "python unbuffered": f"{sys.executable} -c \"import sys; open(sys.argv[2], 'wb', 0).write(open(sys.argv[1],"
    " 'rb').read())\" {file} {node}",
    "appending": "cat {file} >> {node}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_loads_a_policy(name: str, shared: Emulator, tmp_path: Path) -> None:
    loaded = "W" + "".join(filter(str.isalpha, name))
    file = tmp_path / "policy.p7b"
    file.write_bytes(policy(loaded))
    script = WRITERS[name].replace("{file}", str(file)).replace("{node}", str(shared.ipe / "new_policy"))
    done = subprocess.run(
        ["bash", "-c", script.replace("{{", "{").replace("}}", "}")], capture_output=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert loaded in shared.names()


@pytest.mark.parametrize(
    "writer",
    [
        "echo 0 > {node}",
        "printf 0 > {node}",
        "busybox sh -c 'echo 0 > {node}'",
        "bash -c 'printf 0 > {node}'",
        "echo 0 | tee {node} >/dev/null",
        "echo 0 | busybox tee {node} >/dev/null",
        "echo 0 | dd of={node} status=none",
    ],
)
def test_every_shell_writes_booleans(writer: str, shared: Emulator) -> None:
    node = shared.ipe / "success_audit"
    assert write(node, b"1") == 1
    subprocess.run(["sh", "-c", writer.format(node=node)], check=True, timeout=20)
    assert node.read_bytes() == b"0"


@pytest.mark.parametrize("block", ["bs=512", "bs=1k"])
def test_pieces_are_policies_of_their_own_and_fail(block: str, shared: Emulator, tmp_path: Path) -> None:
    file = tmp_path / "policy.p7b"
    file.write_bytes(policy("Pieces"))
    done = subprocess.run(
        ["dd", f"if={file}", f"of={shared.ipe / 'new_policy'}", block], capture_output=True, timeout=20, check=False
    )
    assert done.returncode != 0
    assert b"Bad message" in done.stderr
    assert "Pieces" not in shared.names()


@pytest.mark.parametrize(
    "call",
    [
        "os.sendfile(node, file, 0, 1 << 16)",
        "r, w = os.pipe(); os.splice(file, w, 1 << 16); os.splice(r, node, 1 << 16)",
    ],
)
def test_the_data_of_another_file_cannot_be_spliced_in(call: str, shared: Emulator, tmp_path: Path) -> None:
    file = tmp_path / "policy.p7b"
    file.write_bytes(policy("Spliced"))
    code = f"node, file = os.open(sys.argv[1], os.O_WRONLY), os.open(sys.argv[2], os.O_RDONLY)\n{call}"
    assert python(code, shared.ipe / "new_policy", file) == EINVAL
    enforce = tmp_path / "one"
    enforce.write_bytes(b"1")
    assert python(code, shared.ipe / "enforce", enforce) == EINVAL
    assert "Spliced" not in shared.names()


def test_copy_file_range_from_one_node_to_another_is_refused(shared: Emulator) -> None:
    code = "os.copy_file_range(os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY), 9)"
    assert python(code, shared.ipe / "enforce", shared.ipe / "success_audit") == EINVAL


def test_a_vector_is_one_write_for_each_segment(shared: Emulator) -> None:
    node = shared.ipe / "new_policy"
    fd = os.open(node, os.O_WRONLY)
    try:
        both = [policy("SegmentA"), policy("SegmentB")]
        assert os.writev(fd, both) == sum(map(len, both))
        assert {"SegmentA", "SegmentB"} <= shared.names()
        whole = policy("SegmentC")
        with pytest.raises(OSError, match="Bad message"):
            os.writev(fd, [whole[:500], whole[500:]])
        # what came before the failure counts
        assert os.writev(fd, [policy("SegmentD"), b"0"]) == len(policy("SegmentD"))
    finally:
        os.close(fd)
    assert "SegmentC" not in shared.names()


# FUSE cuts a write at about 1 MiB.
def test_a_write_that_fuse_cuts_is_judged_as_the_one_it_is(shared: Emulator) -> None:
    node = shared.ipe / "new_policy"
    for size in (65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, (4 << 20) - 1):
        assert write(node, b"\x30" * size) == -EMSGSIZE, size
    for size in (4 << 20, 5 << 20):
        assert write(node, b"\x30" * size) == -ENOMEM, size
    # A policy at the start of a long write, and pieces that would each be one: still one write, and no policy.
    small = policy("Hidden")
    assert write(node, small + b"\0" * (2 << 20)) == -EMSGSIZE
    assert "Hidden" not in shared.names()


def test_a_boolean_counts_however_long_the_write_is(shared: Emulator) -> None:
    node = shared.ipe / "success_audit"
    assert write(node, b"1" * (3 << 20)) == 3 << 20
    assert node.read_bytes() == b"1"
    assert write(node, b"0" + b"1" * (3 << 20)) == (3 << 20) + 1
    assert node.read_bytes() == b"0"
    assert write(node, b"x" * (3 << 20)) == -EINVAL


def test_a_long_text_is_one_policy(mount: Mount, tmp_path: Path) -> None:
    rules = b"op=EXECUTE boot_verified=TRUE action=ALLOW\n"
    long = text("Long", body="DEFAULT action=DENY\n") + rules * 30_000
    assert len(long) > 1 << 20
    fresh = mount("--boot-verified", os.path.realpath(sys.executable), kernel="op-policy")
    assert write(fresh.ipe / "new_policy", long) == len(long)
    assert (fresh.policies / "Long" / "policy").read_bytes() == long
    assert write(fresh.ipe / "new_policy", long.replace(b"Long", b"Bad") + b"x") == -EBADMSG
    assert fresh.names() == {"AllowInitramfs", "Long"}


def test_another_thread_and_another_process_may_write(shared: Emulator) -> None:
    fd = os.open(shared.ipe / "new_policy", os.O_WRONLY)
    try:
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(os.write(fd, policy("Thread"))))
        thread.start()
        thread.join(20)
        assert results == [len(policy("Thread"))]
        code = "os.write(int(sys.argv[1]), open(sys.argv[2], 'rb').read())"
        file = shared.audit_log.parent / "child.p7b"
        file.write_bytes(policy("Child"))
        program = f"import os, sys\n{code}"
        subprocess.run([sys.executable, "-c", program, str(fd), file], pass_fds=[fd], check=True, timeout=20)
    finally:
        os.close(fd)
    assert {"Thread", "Child"} <= shared.names()


def test_the_capability_is_that_of_the_opener(shared: Emulator) -> None:
    """Gained later it does not count, dropped later it does not matter, and a nested user namespace has none."""
    node = shared.ipe / "success_audit"
    drop = ["setpriv", "--bounding-set", "-mac_admin", "--inh-caps", "-mac_admin"]
    code = "import os, sys; os.write(int(sys.argv[1]), b'0')"
    fd = os.open(node, os.O_WRONLY)
    try:
        subprocess.run([*drop, sys.executable, "-c", code, str(fd)], pass_fds=[fd], check=True, timeout=20)
    finally:
        os.close(fd)
    without = subprocess.run([*drop, "tee", node], input=b"1", capture_output=True, check=False, timeout=20)
    assert b"not permitted" in without.stderr
    nested = subprocess.run(
        ["unshare", "--user", "--map-root-user", "tee", node], input=b"1",
        capture_output=True, check=False, timeout=20,
    )  # fmt: skip
    assert b"not permitted" in nested.stderr
    assert node.read_bytes() == b"0"


def test_many_write_at_once_and_each_policy_loads_once(shared: Emulator) -> None:
    node = shared.ipe / "new_policy"
    files = []
    for number in range(12):
        file = shared.audit_log.parent / f"many{number}.p7b"
        file.write_bytes(policy(f"Many{number % 6}"))
        files.append(file)
    writers = [subprocess.Popen(["sh", "-c", f"cat {file} > {node}"], stderr=subprocess.PIPE) for file in files]
    failures = [writer.communicate(timeout=30)[1] for writer in writers]
    assert sum(b"File exists" in failure for failure in failures) == 6
    assert sum(not failure for failure in failures) == 6
    assert {f"Many{number}" for number in range(6)} <= shared.names()


def test_a_reader_sees_the_old_policy_or_the_new_one(shared: Emulator) -> None:
    filler = "#" + "x" * 30_000 + "\n"
    versions = [text("Changing", f"{number}.0.0", filler + "DEFAULT action=ALLOW\n") for number in range(20)]
    assert write(shared.ipe / "new_policy", signed(versions[0])) > 0
    seen: set[bytes] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            # In one read(2): between two of them the policy may change on a kernel as well.
            fd = os.open(shared.policies / "Changing" / "policy", os.O_RDONLY)
            seen.add(os.read(fd, 1 << 20))
            os.close(fd)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for version in versions[1:]:
            assert write(shared.policies / "Changing" / "update", signed(version)) > 0
    finally:
        over.set()
        reader.join(20)
    assert seen <= set(versions)
    assert len(seen) > 1


def test_a_writer_that_dies_in_the_middle_leaves_a_sound_state(shared: Emulator) -> None:
    """Its write is judged or not, as a whole; the mount goes on."""
    loop = "while :; do cat {file} > {node}; echo 1 > {delete}; done"
    file = shared.audit_log.parent / "dying.p7b"
    file.write_bytes(policy("Dying", body="#" + "x" * 60_000 + "\nDEFAULT action=ALLOW\n"))
    script = loop.format(file=file, node=shared.ipe / "new_policy", delete=shared.policies / "Dying" / "delete")
    for _ in range(10):
        writer = subprocess.Popen(["sh", "-c", script], start_new_session=True, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.05)
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait(20)
        assert (shared.ipe / "enforce").read_bytes() == b"1"
    # The last one's write may still be under way: a killed process waits for the answer to what it has written.
    while (answer := write(shared.ipe / "new_policy", file.read_bytes())) == -errno.EEXIST:
        assert write(shared.policies / "Dying" / "delete", b"1") in (1, -errno.ENOENT)
    assert answer == len(file.read_bytes())
    assert (shared.policies / "Dying" / "policy").read_bytes().startswith(b"policy_name=Dying")


def test_asynchronous_writers_are_refused_not_guessed(shared: Emulator) -> None:
    """Whoever writes through a kernel thread waits in no write of its own that could be looked at."""
    enforce = shared.ipe / "success_audit"
    before = enforce.read_bytes()
    status = subprocess.run([sys.executable, "-m", "tests.securityfs.asynchronous", enforce], timeout=30, check=False)
    assert status.returncode == EACCES
    assert enforce.read_bytes() == before


# -- what the wrappers of Python do not let through ---------------------------------------------------------------

RWF_HIPRI, RWF_APPEND = 1, 0x10
#: The first page, which no process may map (vm.mmap_min_addr).
UNMAPPED = 1


def pwritev2(fd: int, data: bytes, offset: int, flags: int) -> int:
    """The count, or minus the errno."""
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(data))
    try:
        return syscalls.call("pwritev2", fd, ctypes.addressof(vector), 1, offset, 0, flags)
    except OSError as error:
        return -(error.errno or 0)


def writev(fd: int, *segments: tuple[int, int]) -> int:
    """Write the memory at these addresses and of these lengths: the count, or minus the errno."""
    vector = (ctypes.c_uint64 * (2 * len(segments)))(*(word for segment in segments for word in segment))
    try:
        return syscalls.call("writev", fd, ctypes.addressof(vector), len(segments))
    except OSError as error:
        return -(error.errno or 0)


@pytest.fixture
def end_of_memory() -> Iterator[Callable[[bytes], int]]:
    """Put data at the very end of mapped memory; gives its address. What follows cannot be read."""
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        middle = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
        syscalls.call("mprotect", middle, mmap.PAGESIZE, 0)

        def put(data: bytes) -> int:
            memory[mmap.PAGESIZE - len(data) : mmap.PAGESIZE] = data
            return middle - len(data)

        yield put
        gc.collect()  # the pointer into the mapping


@pytest.mark.parametrize("flag", [os.RWF_DSYNC, os.RWF_SYNC, RWF_APPEND, RWF_HIPRI | os.RWF_SYNC])
def test_flags_of_pwritev2_are_refused(flag: int, shared: Emulator) -> None:
    """``do_loop_readv_writev()`` knows none but RWF_HIPRI, and answers before a handler is asked."""
    node = shared.ipe / "success_audit"
    assert write(node, b"0") == 1
    records = len(shared.records())
    for path, data in ((node, b"1"), (shared.ipe / "new_policy", policy("Flags"))):
        fd = os.open(path, os.O_WRONLY)
        try:
            for offset in (0, -1):
                assert pwritev2(fd, data, offset, flag) == -errno.EOPNOTSUPP
        finally:
            os.close(fd)
    assert node.read_bytes() == b"0"
    assert "Flags" not in shared.names()
    assert len(shared.records()) == records


def test_pwritev2_without_flags_or_with_hipri_writes(shared: Emulator) -> None:
    node = shared.ipe / "success_audit"
    fd = os.open(node, os.O_WRONLY)
    try:
        for value, flags in ((b"1", 0), (b"0", RWF_HIPRI)):
            assert pwritev2(fd, value, 0, flags) == 1
            assert node.read_bytes() == value
    finally:
        os.close(fd)


def test_what_was_written_before_a_bad_segment_counts(shared: Emulator, end_of_memory: Callable[[bytes], int]) -> None:
    """Each segment is one write: what came before the one that cannot be read took effect, and is the answer."""
    node = shared.ipe / "success_audit"
    assert write(node, b"0") == 1
    fd = os.open(node, os.O_WRONLY)
    try:
        address = end_of_memory(b"1")
        assert writev(fd, (address, 1), (UNMAPPED, 5)) == 1
        assert node.read_bytes() == b"1"
        assert writev(fd, (UNMAPPED, 5), (address, 1)) == -errno.EFAULT
    finally:
        os.close(fd)
    whole = policy("BeforeBad")
    fd = os.open(shared.ipe / "new_policy", os.O_WRONLY)
    try:
        address = end_of_memory(whole)
        assert writev(fd, (address, len(whole)), (UNMAPPED, 5)) == len(whole)
    finally:
        os.close(fd)
    assert "BeforeBad" in shared.names()


def test_a_write_beyond_the_end_of_memory_writes_nothing(
    shared: Emulator, end_of_memory: Callable[[bytes], int]
) -> None:
    """The part that FUSE passes on is not the write."""
    whole = policy("HalfMapped")
    address = end_of_memory(whole)
    fd = os.open(shared.ipe / "new_policy", os.O_WRONLY)
    try:
        assert writev(fd, (address, len(whole) + 1)) == -errno.EFAULT
    finally:
        os.close(fd)
    assert "HalfMapped" not in shared.names()
    assert shared.records()[-1].endswith("res=0 errno=-14")
    # of a boolean three bytes are looked at, wherever it ends
    fd = os.open(shared.ipe / "success_audit", os.O_WRONLY)
    try:
        assert writev(fd, (end_of_memory(b"0\n\n"), 100)) == 3  # the kernel's 100 is more than FUSE has been told of
        assert writev(fd, (end_of_memory(b"1\n"), 100)) == -errno.EFAULT
    finally:
        os.close(fd)
    assert (shared.ipe / "success_audit").read_bytes() == b"0"


@pytest.mark.parametrize("node", ["enforce", "new_policy"])
def test_a_record_names_the_login_of_the_writer(mount: Mount, node: str) -> None:
    """And not the opener's: the kernel asks audit_get_loginuid(current)."""
    emulator = mount()
    code = (
        "fd = os.open(sys.argv[1], os.O_WRONLY)\n"
        "def login(number):\n"
        "    if os.path.exists('/proc/self/loginuid'): open('/proc/self/loginuid', 'w').write(number)\n"
        "login('1234')\n"
        "child = os.fork()\n"
        "if not child: login('1235')\n"
        "if child: os.waitpid(child, 0)\n"
        "os.write(fd, b'0' if not child else b'1')"
    )
    python(code, emulator.ipe / node)
    logins = [record.partition(" auid=")[2].split()[0] for record in emulator.records() if " auid=" in record]
    # Nobody logs in on a kernel without audit.
    assert logins == (["1235", "1234"] if Path("/proc/self/loginuid").exists() else ["4294967295"] * 2)
