"""``run --volume``: images mounted as on dm-verity, as root and as a user without privileges."""

import os
import re
import select
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests.exec_hook.running import Runner, descendants_of, runner, wait_until
from tests.volumes.images import BLOCK, MAKERS, Volume, make_image, make_volume, protect, tamper

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

#: A file of this content is larger than what is read ahead of one that is read before it.
LARGE = b"".join(b"%016d" % number for number in range(1 << 16))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tree")
    busybox = shutil.which("busybox")
    assert busybox
    (directory / "bin").mkdir()
    (directory / "bin/#first").write_bytes(bytes(range(256)) * 1024)  # no program is in the image's first block
    shutil.copy(busybox, directory / "bin/sh")
    (directory / "bin/script").write_text("#!/bin/sh\necho script\n")
    (directory / "bin/script").chmod(0o755)
    (directory / "bin/ash").symlink_to("sh")
    (directory / "large").write_bytes(LARGE)
    (directory / "small").write_text("small\n")
    (directory / "private").write_text("private\n")
    (directory / "private").chmod(0o600)
    return directory


@pytest.fixture(scope="module")
def volumes(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Volume]:
    place = tmp_path_factory.mktemp("volumes")
    return {kind: make_volume(kind, tree, place) for kind in MAKERS}


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    (tmp_path / "mnt").mkdir()
    return runner(tmp_path, plain_user=request.param == "plain-user")


def copied(volume: Volume, emu: Runner) -> Volume:
    """The same volume, where whoever runs it may read it."""
    copies = [Path(shutil.copy(path, emu.place)) for path in (volume.image, volume.hash_image)]
    for path in copies:
        path.chmod(0o644)
    return Volume(volume.kind, copies[0], copies[1], volume.root_hash)


def policy(emu: Runner, root_hash: str) -> tuple[str, str, str, str]:
    """The options for a machine that allows what is below /usr, and the volume with this root hash."""
    path = emu.place / "volume.pol"
    path.write_text(
        "policy_name=Volume policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
        f"op=EXECUTE dmverity_roothash=sha256:{root_hash} action=ALLOW\n"
    )
    return ("--boot-policy", str(path), "--boot-verified", "/usr")


@pytest.mark.parametrize("kind", list(MAKERS))
def test_programs_of_the_volume_run_and_copies_of_them_do_not(
    emu: Runner, kind: Kind, volumes: dict[Kind, Volume]
) -> None:
    volume = copied(volumes[kind], emu)
    script = """
        cd mnt
        bin/ash -c 'echo program'; bin/script; cat small; ls -ln bin/sh private | cut -c1-14; stat -c '%s %F %u' large
        cp bin/sh ../copy; ../copy -c 'echo never'; echo "status $?"
        touch new; echo x > small
        mount -o remount,rw . 2>/dev/null || echo "stays read-only"
        cmp large /dev/fd/3 3< ../large && echo same
        ls /sys/kernel/security; cat /proc/self/mountinfo | grep -c images
    """
    (emu.place / "large").write_bytes(LARGE)
    log = emu.place / "log"
    options = (*policy(emu, volume.root_hash), "--audit-log", str(log), "--cmdline", "ipe.success_audit=1")
    done = emu.shell(script, "--volume", volume.option("mnt"), *options)
    assert done.stdout.splitlines() == [
        "program", "script", "small", "-rwxr-xr-x 1 0", "-rw------- 1 0", f"{len(LARGE)} regular file 0",
        "status 126", "stays read-only", "same", "ima", "integrity", "ipe", "lsm", "0",
    ], done.stderr  # fmt: skip
    assert done.stderr.count("Read-only file system") == 2
    records = log.read_text()
    where = f'path="{emu.place}/mnt/bin/sh" dev="dm-0"'
    rule = f'rule="op=EXECUTE dmverity_roothash="sha256":{volume.root_hash.upper()} action=ALLOW"'
    assert [line for line in records.splitlines() if where in line and rule in line]
    assert f'path="{emu.place}/copy" dev="' in records
    assert "denied: 1" in done.stderr


def test_several_volumes_each_with_its_own_facts(emu: Runner, volumes: dict[Kind, Volume]) -> None:
    """Also through bind mounts, under chroot, and not for what is mounted over them."""
    one, other = (copied(volumes[kind], emu) for kind in (Kind.SQUASHFS, Kind.EXT4))
    (emu.place / "other").mkdir()
    script = """
        mnt/bin/sh -c 'echo one'; other/bin/sh -c 'echo other'
        mkdir /tmp/volume-test; mount --bind mnt/bin /tmp/volume-test; /tmp/volume-test/sh -c 'echo bound'
        umount /tmp/volume-test; rmdir /tmp/volume-test
        chroot mnt /bin/sh -c 'echo rooted'
        mkdir /tmp/volume-root; mount -t tmpfs none /tmp/volume-root; mkdir -p /tmp/volume-root/a/bin
        cp mnt/bin/sh /tmp/volume-root/a/bin; mkdir /tmp/volume-root/a/mnt; mount --bind mnt /tmp/volume-root/a/mnt
        unshare -m chroot /tmp/volume-root/a /mnt/bin/sh -c 'echo below'; umount -R /tmp/volume-root
        mount -t tmpfs none mnt; mkdir mnt/bin; cp other/bin/sh mnt/bin/sh; mnt/bin/sh -c 'echo covered'
        mnt/bin/sh -c 'echo covered'
    """
    log = emu.place / "log"
    done = emu.shell(
        script, "--volume", one.option("mnt"), "--volume", other.option("other"), "--audit-log", str(log),
        *policy(emu, one.root_hash),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["one", "bound", "rooted", "below"], done.stderr
    denied = re.findall(r'path="([^"]*)" dev="([^"]*)"', log.read_text())
    assert denied == [(f"{emu.place}/other/bin/sh", "dm-1")] + 2 * [(f"{emu.place}/mnt/bin/sh", "tmpfs")]


def test_a_tampered_block_makes_its_reads_fail_and_no_others(emu: Runner, volumes: dict[Kind, Volume]) -> None:
    volume = copied(volumes[Kind.SQUASHFS], emu)
    position = volume.image.read_bytes().index(LARGE[600_000:600_064])
    tamper(volume.image, position)
    script = """
        cat mnt/small; head -c 100000 mnt/large | tail -c 16; echo; cat mnt/large > /dev/null; echo $?
        mnt/bin/sh -c 'echo runs'
    """
    done = emu.shell(script, "--volume", volume.option("mnt"), *policy(emu, volume.root_hash))
    assert done.stdout.splitlines() == ["small", LARGE[100_000 - 16 : 100_000].decode(), "1", "runs"], done.stderr
    assert "Input/output error" in done.stderr
    assert f"data block {position // BLOCK} (at byte {position // BLOCK * BLOCK}) is corrupted" in done.stderr


def test_a_tampered_program_is_eio_before_the_policy_is_asked(emu: Runner, volumes: dict[Kind, Volume]) -> None:
    volume = copied(volumes[Kind.SQUASHFS], emu)
    position = volume.image.read_bytes().index(b"\x7fELF")
    tamper(volume.image, position)
    log = emu.place / "log"
    done = emu.shell(
        "mnt/bin/sh -c true; echo $?", "--volume", volume.option("mnt"), "--audit-log", str(log),
        *policy(emu, volume.root_hash),
    )  # fmt: skip
    assert done.stdout == "126\n", done.stderr
    assert "Input/output error" in done.stderr
    assert log.read_text() == ""


@pytest.mark.parametrize("kind", [Kind.EXT4, Kind.EROFS])
def test_where_errors_would_be_hidden_all_is_verified_first(
    emu: Runner, kind: Kind, volumes: dict[Kind, Volume]
) -> None:
    volume = copied(volumes[kind], emu)
    tamper(volume.image, volume.image.stat().st_size - 10)
    done = emu.shell("echo never", "--volume", volume.option("mnt"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "is corrupted" in done.stderr


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_file_system_that_its_program_cannot_read(emu: Runner, kind: Kind, tree: Path) -> None:
    """What dm-verity vouches for may be nonsense all the same."""
    image = make_image(kind, tree, emu.place / "broken.img")
    with image.open("r+b") as stream:
        # squashfs: where its tables begin; ext4: features that nobody knows; erofs: the root's number, and no checksum.
        changes = {
            Kind.SQUASHFS: [(64, b"\xff" * 4)],
            Kind.EXT4: [(1024 + 96, b"\x42\x02\0\x40")],
            Kind.EROFS: [(1024 + 8, bytes(4)), (1024 + 14, b"\xff\xff")],
        }
        for position, content in changes[kind]:
            stream.seek(position)
            stream.write(content)
    volume = protect(kind, image)
    volume.hash_image.chmod(0o644)
    done = emu.shell("echo never", "--volume", volume.option("mnt"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "broken.img: cannot be mounted: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_is_not_there(emu: Runner, volumes: dict[Kind, Volume]) -> None:
    done = emu.shell("echo never", "--volume", copied(volumes[Kind.EXT4], emu).option("gone"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "gone: no such directory; make it first" in done.stderr


def test_a_root_hash_that_must_be_signed(emu: Runner, volumes: dict[Kind, Volume]) -> None:
    volume = copied(volumes[Kind.SQUASHFS], emu).option("mnt")
    done = emu.shell("echo never", "--cmdline", "dm_verity.require_signatures=1", "--volume", volume)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ENOKEY" in done.stderr


def helpers_of(process: int) -> list[int]:
    return [pid for pid in descendants_of(process) if b"squashfuse" in Path(f"/proc/{pid}/comm").read_bytes()]


@pytest.mark.needs("root")
def test_helpers_see_nothing_of_ours_and_end_with_us(volumes: dict[Kind, Volume], tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    emu = runner(tmp_path, plain_user=False)
    volume = copied(volumes[Kind.SQUASHFS], emu)
    command = ["sh", "-c", "echo ready; read forever"]
    with emu.start("run", "--volume", volume.option("mnt"), "--", *command, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (helper,) = helpers_of(process.pid)
        seen = sorted(path.readlink().name.partition(":")[0] for path in Path(f"/proc/{helper}/fd").iterdir())
        assert [name for name in seen if name not in ("null", "memfd", "fuse", "dm-0")] == []
        assert not [link for link in Path(f"/proc/{helper}/fd").iterdir() if stat.S_ISSOCK(link.stat().st_mode)]
        tree = [process.pid, *descendants_of(process.pid)]
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not [pid for pid in tree[1:] if Path(f"/proc/{pid}").exists()], "the end of everything")
    assert "squashfs" not in Path("/proc/self/mountinfo").read_text()


def test_a_helper_that_dies_fails_the_rehearsal(tmp_path: Path, volumes: dict[Kind, Volume]) -> None:
    (tmp_path / "mnt").mkdir()
    emu = runner(tmp_path, plain_user=False)
    volume = copied(volumes[Kind.SQUASHFS], emu)
    command = "echo ready; read go; cat mnt/small || echo gone"
    options = {"stdin": subprocess.PIPE}
    with emu.start("run", "--volume", volume.option("mnt"), "--", "sh", "-c", command, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (helper,) = helpers_of(process.pid)
        ended = os.pidfd_open(helper)
        os.kill(helper, signal.SIGKILL)
        assert select.select([ended], [], [], 20)[0]
        os.close(ended)
        output, errors = process.communicate("go\n", timeout=60)
    assert output == "gone\n", errors
    assert process.returncode == 125
    assert "the program that serves dm-0 ended before the command did" in errors


def test_an_image_that_changes_under_a_reader_which_hides_errors(tmp_path: Path, volumes: dict[Kind, Volume]) -> None:
    """What fuse2fs makes of a block that cannot be read is never seen."""
    (tmp_path / "mnt").mkdir()
    emu = runner(tmp_path, plain_user=False)
    volume = copied(volumes[Kind.EXT4], emu)
    position = volume.image.read_bytes().index(LARGE[600_000:600_064])
    command = "echo ready; read go; cat mnt/large | tail -c 16; echo; cat mnt/small"
    options = {"stdin": subprocess.PIPE}
    with emu.start("run", "--volume", volume.option("mnt"), "--", "sh", "-c", command, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        tamper(volume.image, position)
        output, errors = process.communicate("go\n", timeout=60)
    assert LARGE.index(output.strip().encode()) < 600_000
    assert process.returncode == 125
    assert "dm-0 changed while it was used" in errors
    assert f"data block {position // BLOCK} " in errors
