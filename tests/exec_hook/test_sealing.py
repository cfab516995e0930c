"""fs-verity in a rehearsal: every answer that was recorded on real kernels, and what a rehearsal adds."""

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.linux.fsverity import measure_verity
from tests import vectors
from tests.exec_hook import fsverity_steps
from tests.exec_hook.running import Runner, runner
from tests.integrity.tools import opened
from tests.rootless import UID

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("fuse", "user-namespaces", "root")]

STEPS = Path(fsverity_steps.__file__)
PYTHON = "/usr/bin/python3"
TRUSTED = str(vectors.KEYS / "trusted.pem")


def recorded(kernel: str, keyring: str) -> dict[str, Any]:
    return {
        line["step"]: line["result"]
        for line in vectors.load(kernel, "fsverity-ioctls")
        if line.get("keyring") == keyring
    }


@pytest.fixture(params=["root", "plain"])
def who(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param == "plain", subordinate_ids=True)


@pytest.fixture
def place(who: Runner) -> Iterator[Path]:
    """A directory with two files that bear a flag, where its file system can have that."""
    who.place.chmod(0o755)  # the steps know another user, who gets there by the working directory
    files = [who.place / "append-only", who.place / "immutable"]
    for path, flag in zip(files, (0x20, 0x10), strict=True):
        path.touch()
        os.chown(path, UID if who.plain_user else 0, -1)
        set_flags(path, flag)
    (who.place / "signatures").write_text(json.dumps(vectors.load("linux-7.3", "fsverity-ioctls")[0]["signatures"]))
    (who.place / "steps.py").write_text(STEPS.read_text())
    (who.place / "fsverity_steps.py").symlink_to("steps.py")
    (who.place / "sequences.py").write_text(STEPS.with_name("fsverity_sequences.py").read_text())
    yield who.place
    for path in files:
        set_flags(path, 0)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x40086602, flags.to_bytes(8, "little"))
    finally:
        os.close(fd)


@pytest.mark.parametrize("keyring", ["empty", "trusted"])
@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_recorded_answers(kernel: str, keyring: str, who: Runner, place: Path) -> None:
    want = recorded(kernel, keyring)
    assert len(want) == {"empty": 11, "trusted": 114}[keyring]
    keys = ("--fsverity-keys", TRUSTED) if keyring == "trusted" else ()
    program = (PYTHON, "steps.py", ".", "signatures", *want)
    done = who.run("run", "--kernel", kernel, "--sealable", str(place), *keys, "--", *program)
    got = {line["step"]: line["result"] for line in map(json.loads, done.stdout.splitlines())}
    differing = {name: (result, got.get(name)) for name, result in want.items() if got.get(name) != result}
    assert not differing, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_recorded_sequences(kernel: str, who: Runner, place: Path) -> None:
    """Nearly four thousand calls, of which many seal, write to what is sealed, and replace it by the same content."""
    want = vectors.load(kernel, "fsverity-sequences")
    program = (PYTHON, "sequences.py", ".", "signatures", str(len(want)))
    options = ("--kernel", kernel, "--sealable", str(place), "--fsverity-keys", TRUSTED)
    done = who.run("run", *options, "--", *program)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    differing = [pair for pair in zip(want, got, strict=True) if pair[0] != pair[1]]
    assert not differing, differing[0]


def python(place: Path, source: str) -> tuple[str, ...]:
    prelude = f"import sys; sys.path.insert(0, {str(place)!r}); from pathlib import Path; from steps import *\n"
    return (PYTHON, "-c", prelude + f"place = Path({str(place)!r})\n" + source)


@pytest.mark.parametrize("who", ["plain"], indirect=True)
def test_a_file_of_somebody_else_altogether_is_not_judged(who: Runner, place: Path) -> None:
    (place / "file").write_bytes(b"content")
    os.chown(place / "file", 12345, 12345)
    done = who.run(
        "run", "--sealable", str(place), "--", *python(place, "print(outcome(enable, opened(place / 'file')))")
    )
    assert done.stdout == "{'error': 'EACCES'}\n", done.stderr
    (place / "file").chmod(0o666)
    source = "print(as_nobody(enable, opened(place / 'file')))"
    done = who.run("run", "--sealable", str(place), "--", *python(place, source))
    assert done.returncode == 125, done.stderr
    assert done.stdout == "{'error': 'EPERM'}\n"
    assert "whether the caller may write to it cannot be told" in done.stderr


def test_a_writer_outside_of_the_rehearsal_counts(who: Runner, place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"content")
    if who.plain_user:
        os.chown(path, UID, UID)
    source = "print(outcome(enable, opened(place / 'file')))"
    with path.open("ab"):
        done = who.run("run", "--sealable", str(place), "--", *python(place, source))
    assert (done.returncode, done.stdout) == (0, "{'error': 'ETXTBSY'}\n"), done.stderr


def test_a_seal_ends_with_the_rehearsal(who: Runner, place: Path) -> None:
    source = "print(sealed(place).exists())"
    for _ in range(2):
        done = who.run("run", "--sealable", str(place), "--", *python(place, source))
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    (place / "file").write_bytes(b"other")


def test_only_what_lies_in_the_directories_can_be_sealed(who: Runner, place: Path) -> None:
    """Elsewhere the file system answers itself: no kernel seals files on tmpfs."""
    (place / "in").mkdir()
    (place / "inside").mkdir()
    for name in ("in", "inside"):
        os.chown(place / name, UID if who.plain_user else 0, -1)
    source = """
checked(_libc.mount(b"t", bytes(place / "inside"), b"tmpfs", 0, None))
for name in ("in", "inside"):
    print(outcome(enable, opened(made(place / name))), outcome(measured, opened(place / name / "file")))
"""
    source = source.replace("_libc", "ctypes.CDLL(None, use_errno=True)")
    done = who.run("run", "--sealable", str(place / "in"), "--", *python(place, source))
    first, second = done.stdout.splitlines()
    assert first.startswith("{'ok': 0} {'ok': [1, '"), done.stderr
    assert second == "{'error': 'ENOTTY'} {'error': 'ENOTTY'}"
    assert done.returncode == 0


def test_without_such_a_directory_it_works_as_on_a_kernel_or_is_reported(who: Runner, place: Path) -> None:
    (place / "file").write_bytes(b"content")
    os.chown(place / "file", UID if who.plain_user else 0, -1)
    done = who.run("run", "--", *python(place, "print(outcome(enable, opened(place / 'file'), version=2))"))
    number = None
    with opened(place / "file") as fd:
        try:
            measure_verity(fd)
        except OSError as error:
            number = error.errno
    if number == errno.EOPNOTSUPP and not Path("/proc/sys/fs/verity").is_dir():
        assert done.returncode == 125
        assert done.stdout == "{'error': 'EPERM'}\n"
        assert "this machine's kernel has no fs-verity; --sealable DIR" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        name = {errno.ENODATA: "EINVAL", errno.EOPNOTSUPP: "ENOTSUP"}.get(number or 0, "ENOTTY")
        assert done.stdout == f"{{'error': {name!r}}}\n"


@pytest.mark.parametrize("who", ["plain"], indirect=True)
def test_what_opens_files_unseen_is_refused(who: Runner, place: Path) -> None:
    source = """
libc = ctypes.CDLL(None, use_errno=True)
def ring(): return checked(libc.syscall(425, 8, ctypes.create_string_buffer(120)))
def in_root(flags):
    how = struct.pack("=QQQ", flags, 0, 0x10)
    os.close(checked(libc.syscall(437, -100, b"file", how, len(how))))
made(place)
os.chdir(place)
print(outcome(ring), outcome(in_root, os.O_RDWR))
enable(opened(place / "file"))
print(outcome(in_root, 0), outcome(in_root, os.O_RDWR))
"""
    done = who.run("run", "--sealable", str(place), "--", *python(place, source))
    assert done.stdout == "{'error': 'ENOSYS'} {'ok': None}\n{'ok': None} {'error': 'EPERM'}\n", done.stderr
    assert done.returncode == 125
    assert "RESOLVE_IN_ROOT" in done.stderr


POLICY = """policy_name=Sealed policy_version=0.0.1
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=EXECUTE fsverity_signature=TRUE action=ALLOW
op=EXECUTE fsverity_digest={digest} action=ALLOW
"""


def test_a_script_seals_with_the_tool_that_is_meant_for_it(who: Runner, place: Path) -> None:
    """Unmodified: fsverity(1) enables, measures and dumps, and what it sealed is executed."""
    for name in ("digest", "signed", "other"):
        (place / name).write_bytes(Path("/bin/true").read_bytes() + name.encode())
        (place / name).chmod(0o755)
        os.chown(place / name, UID if who.plain_user else 0, -1)
    digest = fsverity("digest", "--compact", place / "digest")
    key, cert = (f"--{kind}={vectors.KEYS}/trusted.{suffix}" for kind, suffix in (("key", "key"), ("cert", "pem")))
    fsverity("sign", place / "signed", place / "signed.sig", key, cert)
    (place / "boot.pol").write_text(POLICY.format(digest=f"sha256:{digest}"))
    script = """
        for f in digest signed other; do ./$f; echo $f $?; done
        fsverity enable digest && fsverity measure digest && lsattr digest
        fsverity enable signed --signature=signed.sig
        fsverity enable other --hash-alg=sha512 --block-size=1024 --salt=abcd
        fsverity enable other
        for f in digest signed other; do ./$f; echo $f $?; done
        for part in merkle_tree descriptor; do fsverity dump_metadata $part other >$part; done
        fsverity dump_metadata signature signed | cmp - signed.sig && echo same signature
        (echo more >>digest); cp other digest
        cp digest copy; ./copy; echo copy $?
        mv digest moved; ./moved; echo moved $?
        rm moved; cp copy moved; ./moved; echo again $?
    """
    done = who.run(
        "run", "--kernel", "linux-6.12", "--boot-policy", "boot.pol", "--boot-verified", "/usr", "--sealable", ".",
        "--fsverity-keys", TRUSTED, "--", "sh", "-c", script,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["digest 126", "signed 126", "other 126"]
    assert lines[3] == f"sha256:{digest} digest"
    assert "V" in lines[4].split()[0]
    assert lines[5:] == [
        "digest 0", "signed 0", "other 126", "same signature", "copy 126", "moved 0", "again 126"
    ]  # fmt: skip
    assert "FS_IOC_ENABLE_VERITY failed on 'other': File exists" in done.stderr
    assert done.stderr.count("Operation not permitted") == 2
    options = ("--hash-alg=sha512", "--block-size=1024", "--salt=abcd", "--compact")
    outputs = [f"--out-merkle-tree={place}/tree", f"--out-descriptor={place}/desc"]
    fsverity("digest", *options, *outputs, place / "other")
    assert (place / "merkle_tree").read_bytes() == (place / "tree").read_bytes()
    assert (place / "descriptor").read_bytes() == (place / "desc").read_bytes()


def test_an_overlay_shows_the_seals_of_its_layers_files(who: Runner, place: Path) -> None:
    """As Linux 6.12 and 7.3 do, until a file is copied up."""
    owner = UID if who.plain_user else 0
    for name in ("lower", "upper", "work", "overlay"):
        (place / name).mkdir()
        os.chown(place / name, owner, owner)
    for name in ("sealed", "other"):
        (place / "lower" / name).write_bytes(Path("/bin/true").read_bytes() + name.encode())
        (place / "lower" / name).chmod(0o755)
        os.chown(place / "lower" / name, owner, owner)
    digest = fsverity("digest", "--compact", place / "lower/sealed")
    (place / "boot.pol").write_text(POLICY.format(digest=f"sha256:{digest}"))
    script = """
        fsverity enable lower/sealed && fsverity enable lower/other
        mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay
        for f in sealed other; do overlay/$f; echo $f $?; done
        fsverity measure overlay/sealed
        chmod 700 overlay/sealed
        overlay/sealed; echo copied up $?
        lower/sealed; echo below $?
    """
    options = ("--boot-policy", "boot.pol", "--boot-verified", "/usr", "--sealable", "lower")
    done = who.run("run", *options, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sealed 0", "other 126", "copied up 126", "below 0"], done.stderr
    assert "FS_IOC_MEASURE_VERITY failed on 'overlay/sealed': " in done.stderr


def fsverity(*arguments: object) -> str:
    command = ["fsverity", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
