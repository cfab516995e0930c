"""What is planned for the mount namespace, told before it is done, and the messages between the processes."""

import os
from pathlib import Path

import pytest

from ipe_emu.exec_hook import mount_plan
from ipe_emu.exec_hook.channel import Channel
from ipe_emu.exec_hook.mount_plan import Wanted, plan
from tests.exec_hook.running import runner


def described(wanted: Wanted) -> list[str]:
    return [step.describe() for step in plan(wanted)]


def test_a_plain_tree_is_left_as_it_is() -> None:
    assert described(Wanted()) == ["make every mount private"]


def test_outer_volumes_are_mounted_before_those_in_them() -> None:
    wanted = Wanted(
        verity=[Path("/opt/a/b"), Path("/opt/a")], concealed=[Path("/run/x")], read_only=[Path("/var/log/a")]
    )
    assert described(wanted)[1:] == [
        "bind /opt/a over itself, read-only",
        "bind /opt/a/b over itself, read-only",
        "bind /var/log/a over itself, read-only",
        "conceal /run/x",
    ]


def test_a_shield_is_put_up_before_anything_else_is_mounted() -> None:
    said = described(Wanted(shield=True, verity=[Path("/opt")]))
    assert said[1].startswith("no devices on any mount")
    assert said[2] == "make /sys and all below it read-only"
    assert said[3] == "bind /opt over itself, read-only"


def test_ids_are_shifted_first() -> None:
    assert described(Wanted(shift=3, concealed=[Path("/run/x")]))[1].startswith("give the tree's ids")


def test_a_mounted_emulator_is_shown() -> None:
    assert described(Wanted(securityfs=Path("/mnt/my emu")))[1:] == ["bind /mnt/my emu to /sys/kernel/security"]


def test_a_missing_directory_is_made_by_covering_the_deepest_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_plan, "SECURITYFS", Path("/sys/no-such/security"))
    assert described(Wanted())[1:] == ["cover /sys by a copy that has /sys/no-such/security"]


@pytest.mark.parametrize("name", ["with\nnewline", "with\x1bescape", "\udcff"])
def test_paths_cannot_break_a_line_or_a_terminal(name: str) -> None:
    assert mount_plan.shown(Path("/") / name).isprintable()


@pytest.mark.needs("fuse", "user-namespaces")
@pytest.mark.timeout(60)
def test_debug_tells_the_plan(tmp_path: Path) -> None:
    done = runner(tmp_path, plain_user=False).run("run", "--debug", "--", "true")
    said = [line.removeprefix("ipe-emu: sandbox: ") for line in done.stderr.splitlines() if " sandbox: " in line]
    assert said[0].startswith("root inside is ")
    assert said[1] == "make every mount private"
    assert said[-2:] == [
        "mount the emulated securityfs on /sys/kernel/security",
        "mount a /proc of the sandbox's own processes",
    ]


def test_messages_carry_values_and_descriptors() -> None:
    ours, theirs = Channel.pair()
    reader, writer = os.pipe()
    theirs.send("kind", {"number": 1}, [writer])
    os.close(writer)
    message = ours.receive()
    assert message is not None
    assert (message.kind, message.values, len(message.fds)) == ("kind", {"number": 1}, 1)
    assert not os.get_inheritable(message.fds[0])
    os.write(message.fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    for fd in (reader, *message.fds):
        os.close(fd)
    theirs.close()
    assert ours.receive() is None
    ours.report_failure(OSError(1, "nobody hears it"))
    with pytest.raises(BrokenPipeError):
        ours.ask("anybody?")
    ours.close()
