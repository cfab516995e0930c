"""Images as trees: what is said of their files, the root hash that they must have, and that nothing is left."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from ipe_emu.integrity.dm_verity import Parameters
from ipe_emu.volumes.recognise import Kind
from tests.cli.conftest import Run, spawn
from tests.exec_hook.running import Runner, runner
from tests.integrity.tools import veritysetup_format
from tests.vectors import KEYS
from tests.volumes import sealed_images
from tests.volumes.images import BLOCK, Volume, make_image, make_volume, tamper
from tests.volumes.sealed_images import FILES

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

POLICY = """policy_name=Volume policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE dmverity_roothash={} action=ALLOW
"""
LINES = [
    "/bin/of-nothing: interpreter missing (ENOENT): its interpreter /none is not in the tree",
    "1 program: 1 runs",
    "2 scripts: 1 runs, 1 interpreter missing",
]


def fill(tree: Path) -> Path:
    busybox = shutil.which("busybox")
    assert busybox is not None
    (tree / "bin").mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("/bin/busybox")
    for name, interpreter in (("hello", "/bin/sh"), ("of-nothing", "/none")):
        (tree / "bin" / name).write_text(f"#!{interpreter}\n")
        (tree / "bin" / name).chmod(0o755)
    return tree


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.needs("root"))], ids=["as we are", "a plain user"])
def ipe(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return runner(tmp_path, plain_user=request.param)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return make_volume(Kind.SQUASHFS, fill(tmp_path / "tree"), tmp_path)


def policy_for(place: Path, root_hash: str) -> Path:
    policy = place / "volume.pol"
    policy.write_text(POLICY.format(root_hash))
    return policy


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    image = tmp_path / "sealed.img"
    image.write_bytes(sealed_images.image(4096))
    return image


def left() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("ipe-emu-image.*"))


@pytest.mark.parametrize("kind", Kind)
def test_the_files_of_an_image_are_judged_by_its_root_hash(ipe: Runner, kind: Kind) -> None:
    volume = make_volume(kind, fill(ipe.place / "tree"), ipe.place)
    volume.hash_image.chmod(0o644)  # veritysetup makes it its caller's alone
    policy = policy_for(ipe.place, f"sha256:{volume.root_hash}")
    simulate = ("policy", "simulate", "--policy", str(policy), str(volume.image))
    done = ipe.run(*simulate, "--hash-image", str(volume.hash_image), "--roothash", volume.root_hash)
    rule = f"op=EXECUTE dmverity_roothash=sha256:{volume.root_hash} action=ALLOW"
    assert done.stdout.splitlines() == [*LINES, f"  2 by {rule}"], done.stderr
    assert done.returncode == 1
    assert f"{kind.value}, root hash sha256:{volume.root_hash}" in done.stderr
    unsalted = ipe.run(*simulate)  # another root hash, which the policy does not name
    assert (unsalted.returncode, unsalted.stdout.splitlines()[0]) == (
        1, "/bin/busybox: denied (EACCES at BPRM_CHECK): DEFAULT action=DENY",
    )  # fmt: skip
    assert not left()


@pytest.mark.parametrize("kind", Kind)
def test_a_candidate_for_an_image_is_its_root_hash(tmp_path: Path, kind: Kind) -> None:
    tree = fill(tmp_path / "tree")
    (tree / "lib/firmware").mkdir(parents=True)
    (tree / "lib/firmware/blob").write_text("firmware")
    volume = make_volume(kind, tree, tmp_path)
    done = spawn("policy", "from", "--json", "--hash-image", volume.hash_image, volume.image)
    assert done.returncode == 0, done.stderr
    prop = f"dmverity_roothash=sha256:{volume.root_hash}"
    assert [(rule["operation"], rule["property"]) for rule in json.loads(done.stdout)["rules"]] == [
        ("EXECUTE", prop), ("FIRMWARE", prop),
    ]  # fmt: skip


def test_a_hash_tree_behind_the_data(tmp_path: Path) -> None:
    image = make_image(Kind.SQUASHFS, fill(tmp_path / "tree"), tmp_path / "image")
    size = image.stat().st_size
    root_hash = veritysetup_format(image, image, Parameters(size // BLOCK, salt=b"salt"), f"--hash-offset={size}")
    policy = policy_for(tmp_path, f"sha256:{root_hash}")
    done = spawn("policy", "simulate", "--policy", policy, "--hash-offset", str(size), image)
    assert done.stdout.decode().splitlines()[:3] == LINES, done.stderr


def test_a_signature_must_be_good(tmp_path: Path, volume: Volume) -> None:
    policy = tmp_path / "signed.pol"
    policy.write_text(POLICY.replace("dmverity_roothash={}", "dmverity_signature=TRUE"))
    simulate = ("policy", "simulate", "--policy", policy, "--hash-image", volume.hash_image, volume.image)
    assert b"2 by DEFAULT action=DENY" not in spawn(*simulate, "--signed").stdout
    assert b"3 by DEFAULT action=DENY" in spawn(*simulate).stdout
    bad = tmp_path / "bad.p7s"
    bad.write_bytes(b"\x30\x03\x02\x01\x00")
    done = spawn(*simulate, "--root-hash-signature", bad)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"signature of the root hash" in done.stderr


def test_what_is_not_the_volume_that_was_meant(tmp_path: Path, volume: Volume) -> None:
    simulate = ("policy", "simulate", "--policy", policy_for(tmp_path, "sha256:00"), volume.image)
    with_tree = (*simulate, "--hash-image", volume.hash_image)
    wrong = spawn(*simulate, "--roothash", volume.root_hash)  # the salt is missing
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"it depends on the salt" in wrong.stderr
    assert volume.root_hash.encode() in wrong.stderr
    tamper(volume.hash_image, volume.hash_image.stat().st_size - BLOCK)
    tampered = spawn(*with_tree)
    assert (tampered.returncode, tampered.stdout) == (2, b""), tampered.stderr
    assert b"EIO" in tampered.stderr
    tamper(volume.hash_image, volume.hash_image.stat().st_size - BLOCK)
    tamper(volume.image, 0)
    assert spawn(*with_tree, "--roothash", volume.root_hash).returncode == 2
    assert not left()


def test_files_that_are_no_images(ipe_emu: Run, tmp_path: Path, volume: Volume) -> None:
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(8192))
    policy = policy_for(tmp_path, "sha256:00")
    simulate = ("policy", "simulate", "--policy", policy)
    for arguments, message in (
        ((zeros,), "holds no squashfs, ext4 or erofs file system, but at its beginning zeros"),
        (("/dev/null",), "is neither a regular file nor a block device"),
        ((tmp_path / "nothing",), "No such file or directory"),
        ((volume.image, "--boot-verified", tmp_path), "name files of this machine"),
        ((volume.image, "--hash-image", zeros), "zeros"),
        ((tmp_path, "--hash-image", zeros), "--hash-image: is for an image"),
        ((tmp_path, "--salt", "00"), "--salt: is for an image"),
    ):
        done = ipe_emu(*simulate, *arguments)
        assert (done.status, done.out) == (2, ""), arguments
        assert message in done.err


def test_files_that_an_image_has_sealed_are_known(ipe: Runner, sealed: Path) -> None:
    policy = ipe.place / "seals.pol"
    policy.write_text(
        "policy_name=Seals policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE fsverity_signature=TRUE action=ALLOW\n"
        f"op=EXECUTE fsverity_digest={FILES['hello'].digest()} action=ALLOW\n"
    )
    keys = ipe.place / "trusted.pem"
    keys.write_bytes((KEYS / "trusted.pem").read_bytes())
    done = ipe.run("policy", "simulate", "--policy", str(policy), "--fsverity-keys", str(keys), "--json", str(sealed))
    outcomes = {file["path"]: file["outcome"] for file in json.loads(done.stdout)["files"]}
    assert outcomes == {
        "/hello": "interpreter missing", "/signed": "interpreter missing", "/stranger": "not judged",
        **dict.fromkeys(("/other", "/plain", "/pages", "/pieces", "/hole", "/salted", "/directory/levels"), "denied"),
    }  # fmt: skip
    assert "counts as sealed" not in done.stderr
    assert not left()


def test_scanning_an_image_names_its_seals(ipe: Runner, sealed: Path) -> None:
    done = ipe.run("verity", "scan", "--all", "--json", str(sealed))
    files = {file["path"].lstrip("/"): file for file in json.loads(done.stdout)["files"]}
    assert {name: file["sealed"] for name, file in files.items()} == {
        name: str(file.digest()) if file.is_sealed else None for name, file in FILES.items()
    }
    assert [name for name, file in files.items() if "with a signature" in file["known"]] == ["signed", "stranger"]
    assert done.returncode == 0
    text = ipe.run("verity", "scan", str(sealed)).stdout
    assert f", sealed as {FILES['salted'].digest()}  /salted\n" in text
    assert not left()


def test_a_seal_that_is_broken_is_not_judged(ipe: Runner, sealed: Path) -> None:
    image = bytearray(sealed.read_bytes())
    for region in ("data", "descriptor"):
        image[sealed_images.regions(bytes(image))[region][0][0]] ^= 1
    sealed.write_bytes(image)
    done = ipe.run("verity", "scan", str(sealed))
    assert done.returncode == 4
    assert "/hello: " in done.stderr
    assert "/hello\n" not in done.stdout
