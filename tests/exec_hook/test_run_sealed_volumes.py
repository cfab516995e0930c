"""``run --volume`` of ext4 images with files that fs-verity has sealed, as a kernel sealed them."""

import os
from pathlib import Path

import pytest

from ipe_emu.volumes.recognise import Kind
from tests import vectors
from tests.exec_hook.running import Runner, runner
from tests.volumes import sealed_images
from tests.volumes.images import Volume, protect
from tests.volumes.sealed_images import FILES, regions

pytestmark = [pytest.mark.needs("fuse", "user-namespaces"), pytest.mark.timeout(60)]

POLICY = """policy_name=Seals policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
{rules}
"""


@pytest.fixture(params=("caller", "plain-user") if os.geteuid() == 0 else ("caller",))
def emu(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    (tmp_path / "mnt").mkdir()
    return runner(tmp_path, plain_user=request.param == "plain-user")


def volume(place: Path, image: bytes) -> Volume:
    (place / "seals.img").write_bytes(image)
    made = protect(Kind.EXT4, place / "seals.img")
    made.hash_image.chmod(0o644)
    return made


def options(emu: Runner, made: Volume, rules: str, *more: str) -> tuple[str, ...]:
    (emu.place / "seals.pol").write_text(POLICY.format(rules=rules))
    for name in ("trusted.pem", "untrusted.pem"):
        (emu.place / name).write_bytes((vectors.KEYS / name).read_bytes())
    return (
        "--boot-policy", str(emu.place / "seals.pol"), "--boot-verified", "/usr", "--volume", made.option("mnt"),
        "--cmdline", "ipe.success_audit=1", "--audit-log", str(emu.place / "log"), *more,
    )  # fmt: skip


def test_seals_decide(emu: Runner) -> None:
    rules = (
        f"op=EXECUTE fsverity_digest={FILES['hello'].digest()} action=ALLOW\n"
        "op=EXECUTE fsverity_signature=TRUE action=ALLOW"
    )
    made = volume(emu.place, sealed_images.image(4096))
    script = (
        "cd mnt; for name in hello plain other signed stranger; do ./$name; echo $?; done; cp hello ../copy; ../copy"
    )
    done = emu.shell(script, *options(emu, made, rules, "--fsverity-keys", "trusted.pem"))
    assert done.stdout.splitlines() == ["hello", "0", "126", "126", "signed", "0", "126"], done.stderr
    assert done.returncode == 126
    assert "stranger: Required key not available" in done.stderr
    rule = f'op=EXECUTE fsverity_digest="sha256":{FILES["hello"].digest().value.hex().upper()} action=ALLOW'
    assert f'/mnt/hello" dev="dm-0" ino=13 rule="{rule}"' in (emu.place / "log").read_text()


def test_what_is_sealed_is_not_what_is_not(emu: Runner) -> None:
    """A rule that asks for =FALSE holds for files that are not sealed, or not signed, and for no others."""
    made = volume(emu.place, sealed_images.image(4096))
    rules = f"op=EXECUTE dmverity_roothash=sha256:{made.root_hash} fsverity_signature=FALSE action=ALLOW"
    script = "cd mnt; for name in hello plain signed; do ./$name; echo $?; done"
    done = emu.shell(script, *options(emu, made, rules, "--fsverity-keys", "trusted.pem"))
    assert done.stdout.splitlines() == ["hello", "0", "hello", "0", "126"], done.stderr


def test_the_program_fsverity_reads_seals_and_cannot_make_them(emu: Runner) -> None:
    made = volume(emu.place, sealed_images.image(4096))
    script = """
        cd mnt
        fsverity measure hello salted | cut -c1-30
        fsverity measure plain 2>&1
        fsverity dump_metadata descriptor signed | wc -c
        fsverity dump_metadata signature signed | cmp - ../signature && echo same
        fsverity enable plain 2>&1; fsverity enable hello 2>&1
    """
    (emu.place / "signature").write_bytes(FILES["signed"].signature())
    done = emu.shell(script, *options(emu, made, "", "--fsverity-keys", "trusted.pem"))
    assert done.stdout.splitlines() == [
        f"{str(FILES['hello'].digest())[:30]}",
        f"{str(FILES['salted'].digest())[:30]}",
        "ERROR: FS_IOC_MEASURE_VERITY failed on 'plain': No data available",
        "256",
        "same",
        "ERROR: FS_IOC_ENABLE_VERITY failed on 'plain': Read-only file system",
        "ERROR: FS_IOC_ENABLE_VERITY failed on 'hello': Read-only file system",
    ], done.stderr


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ("data", "FILE CORRUPTED"),
        ("tree", "FILE CORRUPTED"),
        ("tail", "FILE CORRUPTED"),
        ("descriptor", "descriptor version"),
    ],
)
def test_an_image_with_a_broken_seal_is_refused(tmp_path: Path, region: str, said: str) -> None:
    (tmp_path / "mnt").mkdir()
    emu = runner(tmp_path, plain_user=False)
    image = bytearray(sealed_images.image(4096))
    image[regions(bytes(image))[region][0][0]] ^= 1
    done = emu.shell("echo never", *options(emu, volume(emu.place, bytes(image)), ""))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "sealed by fs-verity" in done.stderr
