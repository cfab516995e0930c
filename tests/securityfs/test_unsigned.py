"""op=POLICY on a real mount: who writes, and the files that paths name, are established or refused."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.integrity.sources import FactsSource
from ipe_emu.linux.mountinfo import OF_THIS_MACHINE
from ipe_securityfs.policy_file import PolicyFileReader
from tests.securityfs.emulator import Emulator, mounted
from tests.securityfs.policies import policy, text
from tests.securityfs.writing import write

pytestmark = [pytest.mark.needs("fuse", "root", "busybox"), pytest.mark.timeout(60)]

CAT = os.path.realpath(shutil.which("cat") or "")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is on the initramfs."""
    directory = tmp_path_factory.mktemp("unsigned") / "known"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def gate(known: Path) -> Iterator[Emulator]:
    """Everything in ``known`` and cat(1) are on the initramfs; this interpreter is not."""
    shutil.copy(CAT, known / "cat")
    with mounted(known.parent / "m", "--boot-verified", known, kernel="op-policy") as emulator:
        yield emulator


def shell(script: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, timeout=20, cwd=cwd)


def test_the_program_that_writes_is_the_subject(gate: Emulator, known: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.pol"
    file.write_bytes(text("ByCat"))
    node = gate.ipe / "new_policy"
    assert write(node, file.read_bytes()) == -errno.EACCES
    assert f'path="{os.path.realpath(sys.executable)}"' in gate.records()[-2]
    assert "Permission denied" in shell(f"cat {file} > {node}").stderr
    assert f'path="{CAT}"' in gate.records()[-2]
    assert shell(f"{known}/cat {file} > {node}").stderr == ""
    assert "ByCat" in gate.names()


def test_a_descriptor_that_was_handed_on_is_judged_by_who_writes(gate: Emulator, known: Path, tmp_path: Path) -> None:
    """Opened by sh, which is not known; written by the known cat, and the other way round."""
    file = tmp_path / "policy.pol"
    node = gate.ipe / "new_policy"
    file.write_bytes(text("Handed"))
    assert shell(f"exec 3> {node}; {known}/cat {file} >&3").stderr == ""
    assert "Handed" in gate.names()
    file.write_bytes(text("Refused"))
    shutil.copy(shutil.which("busybox") or "", known / "sh")
    opened_by_known = f"exec 3> {node}; /bin/cat {file} >&3"
    done = subprocess.run([known / "sh", "-c", opened_by_known], capture_output=True, check=False, timeout=20)
    assert done.returncode != 0
    assert "Refused" not in gate.names()


def test_records_name_the_process_that_writes(gate: Emulator) -> None:
    code = "import os, sys; print(os.getpid(), flush=True); os.write(os.open(sys.argv[1], 1), b'policy_name=X')"
    done = subprocess.run(
        [sys.executable, "-c", code, gate.ipe / "new_policy"], capture_output=True, text=True, check=False, timeout=20
    )
    comm = Path(sys.executable).name[:15]
    assert f'pid={done.stdout.strip()} comm="{comm}"' in gate.records()[-2]


def test_a_writer_with_threads_is_one_process(gate: Emulator) -> None:
    code = (
        "import os, sys, threading\n"
        "fd = os.open(sys.argv[1], 1)\n"
        "def write():\n    try: os.write(fd, b'policy_name=X')\n    except OSError: pass\n"
        "t = threading.Thread(target=write); t.start(); t.join(); print(os.getpid())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, gate.ipe / "new_policy"], capture_output=True, text=True, check=True, timeout=20
    )
    assert f"pid={done.stdout.strip()} " in gate.records()[-2]


def test_a_path_is_read_as_the_writer_would_read_it(gate: Emulator, known: Path, tmp_path: Path) -> None:
    node = gate.ipe / "new_policy"
    for name, content in (("T.pol", text("FromPath")), ("S.p7b", policy("FromSigned"))):
        (known / name).write_bytes(content)
        path = f"{known}/{name} \n".encode()
        assert write(node, path) == len(path)
    assert {"FromPath", "FromSigned"} <= gate.names()
    link = tmp_path / "link"
    link.symlink_to(known / "L.pol")
    (known / "L.pol").write_bytes(text("FromLink"))
    assert write(node, os.fsencode(link)) == len(os.fsencode(link))
    assert f'path="{known}/L.pol"' in gate.records()[-1] or "FromLink" in gate.names()


def test_files_that_cannot_be_policies(gate: Emulator, known: Path, tmp_path: Path) -> None:
    node = gate.ipe / "new_policy"
    os.mkfifo(known / "fifo")
    (known / "empty").touch()
    cases = {
        known: errno.EINVAL,
        known / "fifo": errno.EINVAL,
        known / "empty": errno.EINVAL,
        Path("/dev/null"): errno.EINVAL,
        Path("/dev/full"): errno.EINVAL,
        Path("/proc/self/mem"): errno.EINVAL,
        Path("/proc/self/status"): errno.EINVAL,
        known / "missing": errno.ENOENT,
        known / "empty" / "x": errno.ENOTDIR,
        Path("/" + "x" * 300): errno.ENAMETOOLONG,
        Path("/" + "x/" * 3000): errno.ENAMETOOLONG,
        gate.ipe / "enforce": errno.EINVAL,
        gate.policies / "AllowInitramfs" / "policy": errno.EINVAL,
    }
    for path, expected in cases.items():
        assert write(node, os.fsencode(path)) == -expected, path
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert write(node, os.fsencode(loop)) == -errno.ELOOP
    # A path that leads through this very mount must not make the emulator wait for itself.
    through = os.fsencode(gate.directory) + b"/ipe/../../known/missing"
    assert write(node, through) == -errno.ENOENT


def test_a_file_that_is_open_for_writing_is_busy(gate: Emulator, known: Path) -> None:
    """``deny_write_access()`` comes before the size is looked at and before IPE is asked."""
    node, file, empty = gate.ipe / "new_policy", known / "busy.pol", known / "busy-and-empty"
    file.write_bytes(text("BusyNoMore"))
    records = len(gate.records())
    with file.open("r+b"), empty.open("wb"):
        assert write(node, os.fsencode(file)) == -errno.ETXTBSY
        assert write(node, os.fsencode(empty)) == -errno.ETXTBSY
    assert [record.split(" ")[0] for record in gate.records()[records:]] == ["IPE_POLICY_LOAD"] * 2
    assert gate.records()[-1].endswith(f"errno=-{errno.ETXTBSY}")
    with file.open("rb"):
        assert write(node, os.fsencode(file)) == len(os.fsencode(file))


def test_nobody_writes_the_file_while_it_is_read(known: Path) -> None:
    """Whoever opens it for writing waits, and this process does not die of being told so."""
    file = known / "read.pol"
    file.write_bytes(b"content")
    tried: list[int | None] = []

    class Facts:
        def facts_of(self, *_: object) -> object:
            try:
                os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                tried.append(error.errno)
            return NO_FACTS

    reader = PolicyFileReader(os.getpid(), os.getpid(), cast("FactsSource", Facts()), OF_THIS_MACHINE, None)
    assert reader(os.fsencode(file))[1] == b"content"
    assert tried == [errno.EWOULDBLOCK]
    os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))


def test_where_writers_cannot_be_told_the_file_is_refused(known: Path, tmp_path: Path) -> None:
    """An emulator without CAP_LEASE is given leases on its own user's files alone."""
    without = ["setpriv", "--bounding-set", "-lease", "--inh-caps", "-lease"]
    strangers = known / "strangers.pol"
    strangers.write_bytes(text("Strangers"))
    own = known / "own.pol"
    own.write_bytes(text("Own"))
    os.chown(strangers, 1000, 1000)
    with mounted(tmp_path / "m", "--boot-verified", known, kernel="op-policy", wrap=without) as emulator:
        assert write(emulator.ipe / "new_policy", os.fsencode(strangers)) == -errno.EACCES
        assert write(emulator.ipe / "new_policy", os.fsencode(own)) == len(os.fsencode(own))


def test_a_writer_s_own_root_and_rights_count(gate: Emulator, known: Path, tmp_path: Path) -> None:
    node = gate.ipe / "new_policy"
    # A writer in a chroot: the same path is another file.
    root = known / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "p.pol").write_bytes(text("InRoot"))
    shutil.copy(shutil.which("busybox") or "", root / "busybox")
    with node.open("wb", buffering=0) as stream:
        done = subprocess.run(
            ["chroot", root, "/busybox", "printf", "/etc/p.pol"], stdout=stream, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "InRoot" in gate.names()
    # A writer who was given the descriptor and may not read the file himself.
    secret = known / "secret.pol"
    secret.write_bytes(text("Secret"))
    secret.chmod(0o600)
    for directory in (known, known.parent, known.parent.parent):
        directory.chmod(0o755)
    with node.open("wb", buffering=0) as stream:
        done = subprocess.run(
            ["setpriv", "--reuid", "1000", "--clear-groups", "/bin/echo", "-n", secret],
            stdout=stream, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert b"Permission denied" in done.stderr
    # Root without the capability to override modes, likewise.
    owned = known / "owned.pol"
    owned.write_bytes(text("Owned"))
    os.chown(owned, 1000, 1000)
    owned.chmod(0o600)
    with node.open("wb", buffering=0) as stream:
        done = subprocess.run(
            ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "/bin/echo", "-n", owned],
            stdout=stream, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert b"Permission denied" in done.stderr
    assert not {"Secret", "Owned"} & gate.names()


def test_an_unsigned_policy_has_no_pkcs7_and_activate_is_active(gate: Emulator, known: Path) -> None:
    (known / "u.pol").write_bytes(text("Unsigned"))
    path = os.fsencode(known / "u.pol")
    assert write(gate.ipe / "new_policy", path) == len(path)
    directory = gate.policies / "Unsigned"
    with pytest.raises(FileNotFoundError):
        (directory / "pkcs7").read_bytes()
    assert (directory / "activate").read_bytes() == b"0"
    assert "activate" not in {path.name for path in directory.iterdir()}
    (directory / "activate").chmod(0o640)
    assert (directory / "active").stat().st_mode == (directory / "activate").stat().st_mode == 0o100640


def test_released_kernels_do_not_know_activate(emulator: Emulator) -> None:
    with pytest.raises(FileNotFoundError):
        (emulator.policies / "AllowInitramfs" / "activate").read_bytes()


def test_pieces_of_a_text_are_policies_of_their_own(gate: Emulator, known: Path, tmp_path: Path) -> None:
    """A known dd that writes a text in pieces has each of them judged, and none of them is a policy."""
    shutil.copy(shutil.which("busybox") or "", known / "dd")
    file = tmp_path / "long.pol"
    file.write_bytes(text("InPieces", body="DEFAULT action=ALLOW\n" + "#" * 3000 + "\n"))
    done = subprocess.run(
        [known / "dd", f"if={file}", f"of={gate.ipe / 'new_policy'}", "bs=20"],
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert done.returncode != 0
    assert "InPieces" not in gate.names()


def test_an_update_that_reads_through_the_mount_does_not_hold_it_up(gate: Emulator, known: Path) -> None:
    """The update holds the policy's lock while its file is opened, and others wait for that lock: none for ever."""
    (known / "u.pol").write_bytes(text("Busy"))
    assert write(gate.ipe / "new_policy", os.fsencode(known / "u.pol")) > 0
    through = f"{gate.directory}/ipe/../../known/u.pol"
    update = f"for i in 1 2 3 4 5 6 7 8 9 10; do printf %s {through} > {gate.policies}/Busy/update; done"
    others = f"for i in 1 2 3 4 5 6 7 8 9 10; do echo 0 > {gate.policies}/Busy/active; cat {gate.ipe}/enforce; done"
    running = [
        subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for script in (update, others, others)
    ]
    for process in running:
        process.wait(15)  # less than the longest time that the opening of a file may take
