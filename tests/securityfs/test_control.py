"""The control socket: what it answers, and whom it refuses."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.keyring import Keyrings
from ipe_emu.linux import mountinfo, procfs
from ipe_emu.lsm import Ipe
from ipe_emu.policy.evaluate import Match
from ipe_emu.policy.rule import Action, Operation
from ipe_emu.profiles import PROFILES
from ipe_securityfs import client, control, wire
from ipe_securityfs.client import Connection, RemoteIpe, RequestError
from ipe_securityfs.service import AuditTap, Service
from tests.securityfs.conftest import Mount
from tests.securityfs.emulator import Emulator, environment
from tests.securityfs.policies import policy, text

pytestmark = [pytest.mark.needs("fuse", "root"), pytest.mark.timeout(60)]


@pytest.fixture
def connection(emulator: Emulator) -> Iterator[Connection]:
    with Connection.open(emulator.directory) as connection:
        yield connection


def socket_of(emulator: Emulator) -> Path:
    key = control.key_of(str(emulator.directory))
    return next(path for place in control.runtime_directories() if (path := place / f"{key}.sock").exists())


def test_status_says_what_is_loaded(emulator: Emulator, connection: Connection) -> None:
    (emulator.ipe / "new_policy").write_bytes(policy("Signed", "1.2.3"))
    (emulator.ipe / "success_audit").write_bytes(b"1")
    status = connection.request("status")
    assert status["mountpoint"] == str(emulator.directory)
    assert status["pid"] == emulator.process.pid
    assert (status["profile"], status["enforce"], status["success_audit"]) == ("linux-7.3", True, True)
    assert status["active"] == "AllowInitramfs"
    assert [(p["name"], p["version"], p["active"], p["signed"]) for p in status["policies"]] == [
        ("AllowInitramfs", "0.0.0", True, False),
        ("Signed", "1.2.3", False, True),
    ]
    assert status["records"]["IPE_POLICY_LOAD"] == 1
    assert status["upstream_refusals"] == []


def test_decide_answers_with_the_record_that_it_caused(emulator: Emulator, connection: Connection) -> None:
    answer = connection.request("decide", operation="FIRMWARE", path="/etc/passwd")
    assert answer["errno"] == 13
    assert answer["hook"] == "KERNEL_READ"
    (record,) = answer["records"]
    assert record["type"] == "IPE_ACCESS"
    assert f'ipe_op=FIRMWARE ipe_hook=KERNEL_READ enforcing=1 pid={os.getpid()} comm="' in record["text"]
    assert 'path="/etc/passwd"' in record["text"]
    assert record["text"].endswith('rule="DEFAULT action=DENY"')
    assert emulator.records()[-1] == f"IPE_ACCESS {record['text']}"
    without_file = connection.request("decide", operation="KMODULE", hook="KERNEL_LOAD", path=None)
    assert "path=? dev=? ino=?" in without_file["records"][0]["text"]
    for path in ("/etc", "/nonexistent"):
        with pytest.raises(RequestError):
            connection.request("decide", operation="FIRMWARE", path=path)


def test_facts_are_resolved_by_the_emulator(mount: Mount, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_bytes(b"x")
    emulator = mount("--boot-verified", known)
    with Connection.open(emulator.directory) as connection:
        answer = connection.request("decide", operation="EXECUTE", path=str(known))
        assert (answer["errno"], answer["file"]["facts"]["boot_verified"]) == (0, True)
        judge = RemoteIpe(connection)
        place = mountinfo.locate(os.fsencode(known))
        assert judge.facts_of(place, known.stat(), lambda: -1).boot_verified
        assert not judge.facts_of(evolve(place, device="0:0"), known.stat(), lambda: -1).boot_verified
        assert not judge.facts_of(None, known.stat(), lambda: -1).boot_verified


class Doubtful:
    """A source that is not certain of anything."""

    def facts_of(self, *_: object) -> Facts:
        raise NotJudgedError("who knows")


@pytest.mark.parametrize("request_", ["decide", "facts"])
def test_what_cannot_be_judged_is_said_as_that(request_: str) -> None:
    ipe = Ipe(Keyrings(), lambda record: None, PROFILES["linux-7.3"], enforce=True, success_audit=False)
    service = Service(ipe, Doubtful(), AuditTap(ipe), {}, lambda: None, lambda namespace: lambda: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = control.Peer(os.getpid(), 0, 0)
        connection = Connection("/somewhere", wire.Lines(ours), peer)
        place = wire.location_out(mountinfo.locate(b"/etc/passwd"))
        status = wire.stat_out(Path("/etc/passwd").stat())
        fields = {"operation": "EXECUTE", "path": "/etc/passwd", "place": place, "stat": status}
        answer = service.handle({"request": request_, **fields}, peer, wire.Lines(theirs))
        assert answer is not None
        wire.Lines(theirs).send(answer)
        with pytest.raises(NotJudgedError, match="who knows"):
            connection.request(request_, **fields)


def test_a_remote_judge_decides_as_the_emulator(emulator: Emulator, connection: Connection) -> None:
    judge = RemoteIpe(connection)
    assert judge.profile.name == "linux-7.3"
    subject = Subject(4711, b'c"\xff\n')
    verified = File(b"/x \xfe", "rootfs", 7, Facts(boot_verified=True))
    allowed = judge.process_event(Operation.EXECUTE, Hook.BPRM_CHECK, subject, verified)
    assert allowed.errno == 0
    assert allowed.verdict is not None
    assert allowed.verdict.match is Match.RULE
    assert allowed.verdict.rule is not None
    assert allowed.verdict.rule.action is Action.ALLOW
    denied = judge.process_event(Operation.EXECUTE, Hook.MMAP, subject, None)
    assert denied.errno == 13
    assert denied.verdict is not None
    assert denied.verdict.match is Match.GLOBAL_DEFAULT
    assert "pid=4711 comm=6322FF0A path=? dev=? ino=?" in emulator.records()[-1]


def test_every_fact_travels() -> None:
    facts = Facts(True, Digest("sha256", b"\1" * 32), True, Digest("sha512", b"\2" * 64), True)
    assert wire.facts_in(json.loads(json.dumps(wire.facts_out(facts)))) == facts
    doubtful = Facts(dmverity_in_doubt="nobody knows", fsverity_in_doubt="")
    assert wire.facts_in(json.loads(json.dumps(wire.facts_out(doubtful)))) == doubtful
    assert wire.facts_in({"boot_verified": 1, "fsverity_signature": "yes"}) == Facts()
    status = Path("/").stat()
    assert wire.stat_out(wire.stat_in(wire.stat_out(status))) == wire.stat_out(status)


def test_followers_get_every_record_as_auditd_would_store_it(emulator: Emulator, connection: Connection) -> None:
    lines: list[bytes] = []
    enough = threading.Event()

    def follow() -> None:
        for line in connection.follow():
            lines.append(line)
            if len(lines) == 3:
                enough.set()

    follower = threading.Thread(target=follow)
    follower.start()
    # Records before the follower was heard are not its: write until the first arrives.
    while not lines:
        (emulator.ipe / "new_policy").write_bytes(policy("Followed"))
        (emulator.policies / "Followed" / "delete").write_bytes(b"1")
    (emulator.ipe / "enforce").write_bytes(b"0")
    assert enough.wait(20)
    assert lines[0].startswith(b"type=IPE_POLICY_LOAD msg=audit(")
    assert b"type=MAC_STATUS" in lines[-1]
    emulator.stop()
    follower.join(20)
    assert not follower.is_alive()


def test_admissions_that_upstream_refuses_are_counted(mount: Mount) -> None:
    emulator = mount("--boot-verified", os.path.realpath(sys.executable), kernel="op-policy")
    (emulator.ipe / "new_policy").write_bytes(text("Unsigned"))
    (emulator.policies / "Unsigned" / "activate").read_bytes()
    with Connection.open(emulator.directory) as connection:
        first, second = connection.request("status")["upstream_refusals"]
    assert "Unsigned" in first["what"]
    assert first["answer"] == "on linux-7.3: EBADMSG"
    assert "activate" in second["what"]


def test_nonsense_is_answered_or_ends_the_connection(emulator: Emulator) -> None:
    path = socket_of(emulator)
    for nonsense in (
        b"\n",
        b"[]\n",
        b"{",
        b"null\n",
        b'{"request": 5}\n',
        b"\xff\xfe\n",
        b"x" * (3 << 20),
        b"[" * 100_000 + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(str(path))
            try:
                raw.sendall(nonsense)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(1 << 16)
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
        assert answer == b"" or "error" in json.loads(answer)
    for request in ("decide", "process_event", "facts", "attach", "no such"):
        with Connection.open(emulator.directory) as connection, pytest.raises((RequestError, UserError)):
            connection.request(request, operation="NONE", path=7, pid="x")
    assert (emulator.ipe / "enforce").read_bytes() == b"1"


def test_the_socket_is_its_owner_s_alone(emulator: Emulator) -> None:
    path = socket_of(emulator)
    status = path.parent.lstat()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == os.geteuid()


@pytest.mark.parametrize(
    "outside",
    [
        ["unshare", "--user", "--map-root-user"],
        ["unshare", "--pid", "--fork"],
        ["unshare", "--user", "--pid", "--fork"],
        ["setpriv", "--reuid", "1000", "--clear-groups"],
    ],
)
def test_strangers_are_refused(outside: list[str], emulator: Emulator) -> None:
    """Through a descriptor of the directory, as a process would have that was meant not to see it."""
    path = socket_of(emulator)
    path.parent.chmod(0o755)
    path.chmod(0o666)
    ask = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        's.sendall(b\'{"request": "stop"}\\n\'); print(s.recv(9999).decode())\n'
    )
    try:
        done = subprocess.run(
            [*outside, "/usr/bin/env", "python3", "-S", "-c", ask, path],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    finally:
        path.parent.chmod(0o700)
        path.chmod(0o600)
    assert "refused" in done.stdout or done.stdout.strip() == "", done.stderr
    assert emulator.process.poll() is None
    assert (emulator.ipe / "enforce").read_bytes() == b"1"


def test_a_false_server_is_not_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process in another namespace listens where the emulator would."""
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    monkeypatch.setattr(client, "runtime_directories", lambda: iter([place]))
    path = place / f"{control.key_of(str(tmp_path))}.sock"
    serve = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up', flush=True); s.accept()\n"
    )
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "/usr/bin/env", "python3", "-S", "-c", serve, path],
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        with pytest.raises(UserError, match="not to be trusted"):
            Connection.open(tmp_path)
        server.wait(20)


def test_runtime_directories_of_others_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 1000, 1000)
    for name in ("link", "open", "file", "foreign"):
        monkeypatch.setattr(control, "runtime_directories", lambda name=name: iter([tmp_path / name]))
        with pytest.raises(UserError):
            control.make_runtime_directory()
    good = tmp_path / "good"
    monkeypatch.setattr(control, "runtime_directories", lambda: iter([tmp_path / "open", good]))
    assert control.make_runtime_directory() == good
    assert stat.S_IMODE(good.stat().st_mode) == 0o700


def test_an_attached_sandbox_s_capabilities_count_while_it_is_attached(emulator: Emulator) -> None:
    node = emulator.ipe / "success_audit"
    code = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    try: open(sys.argv[1], 'wb', 0).write(line.strip().encode()); print('ok', flush=True)\n"
        "    except OSError as e: print(e.errno, flush=True)\n"
    )
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "/usr/bin/env", "python3", "-S", "-c", code, node],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as nested:  # fmt: skip
        assert nested.stdin is not None
        assert nested.stdout is not None

        def write(data: str) -> str:
            assert nested.stdin is not None
            assert nested.stdout is not None
            nested.stdin.write(f"{data}\n")
            nested.stdin.flush()
            return nested.stdout.readline().strip()

        assert write("1") == "1"  # EPERM
        with Connection.open(emulator.directory) as connection:
            client.attach(connection, procfs.namespace(nested.pid, "user"))
            assert write("1") == "ok"
            assert node.read_bytes() == b"1"
        while write("0") == "ok":  # until the emulator has seen that the connection is closed
            pass
        nested.stdin.close()


def test_clients_need_neither_trio_nor_pyfuse3() -> None:
    code = "import sys, ipe_securityfs.client; sys.exit(bool({'trio', 'pyfuse3'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, env=environment())


def test_without_an_emulator_clients_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no emulator is mounted"):
        Connection.open(tmp_path)
    with pytest.raises(UserError, match="no emulator is mounted"):
        client.unmount(tmp_path)


def test_who_looks_for_emulators_keeps_none_from_starting(tmp_path: Path) -> None:
    # As when a user mounts in several places at once: each looks for what killed ones left behind.
    stop = threading.Event()
    refused: list[str] = []

    def start(name: str) -> None:
        for _ in range(3000):
            try:
                with control.held_lock(tmp_path / f"{name}.lock"):
                    pass
            except UserError as error:
                refused.append(str(error))

    def look() -> None:
        while not stop.is_set():
            control.sweep(tmp_path)
            control.is_locked(tmp_path / "0.lock")

    others = [threading.Thread(target=look)]
    starting = [threading.Thread(target=start, args=(str(number),)) for number in range(2)]
    for thread in (*others, *starting):
        thread.start()
    for thread in starting:
        thread.join(50)
    stop.set()
    for thread in others:
        thread.join(50)
    assert not refused
    assert list(tmp_path.iterdir()) == []


def test_only_what_nobody_holds_is_swept(tmp_path: Path) -> None:
    for name in ("dead.lock", "dead.sock", "alive.sock"):
        (tmp_path / name).touch()
    with control.held_lock(tmp_path / "alive.lock"):
        control.sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"alive.lock", "alive.sock"}
        with pytest.raises(UserError, match="mounted there already"), control.held_lock(tmp_path / "alive.lock"):
            pass
