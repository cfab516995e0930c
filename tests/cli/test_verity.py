"""verity dm and verity fs: what they print, what they refuse, and what other programs say of what they make."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from ipe_emu.pkcs7.keys import new_test_key
from tests.cli.conftest import Run, spawn
from tests.integrity.tools import IDENTITY, random_file, tool
from tests.vectors import KEYS

SIZE = 200 * 4096


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return random_file(tmp_path / "data.img", SIZE)


@pytest.fixture
def hash_image(ipe_emu: Run, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "hash.img"
    assert ipe_emu("verity", "dm", "format", data, path).status == 0
    return path


def root_hash(ipe_emu: Run, data: Path, *options: object) -> str:
    done = ipe_emu("verity", "dm", "roothash", *options, data)
    assert done.status == 0, done.err
    return done.out.strip()


def spoil(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_format_makes_what_veritysetup_makes(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    options = ("--salt", "c0ffee", "--hash", "sha512", "--uuid", IDENTITY)
    ours = ipe_emu("verity", "dm", "format", *options, data, tmp_path / "ours")
    theirs = tool("veritysetup", "format", *options, data, tmp_path / "theirs")
    assert ours.status == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert {line.split(":")[0]: line.split()[-1] for line in ours.out.splitlines()}.items() <= {
        line.split(":")[0]: line.removesuffix("[bytes]").split()[-1]  # newer versions name the unit
        for line in theirs.stdout.splitlines()
        if ":" in line
    }.items()


def test_format_salts_at_random_and_both_programs_verify_it(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    reports = []
    for name in ("one", "two"):
        done = ipe_emu("verity", "dm", "format", "--json", data, tmp_path / name)
        assert done.status == 0
        reports.append(json.loads(done.out))
    assert reports[0]["salt"] != reports[1]["salt"]
    assert reports[0]["uuid"] != reports[1]["uuid"]
    for name, report in zip(("one", "two"), reports, strict=True):
        digits = report["root_hash"].partition(":")[2]
        assert tool("veritysetup", "verify", data, tmp_path / name, digits).returncode == 0
        verified = ipe_emu("verity", "dm", "verify", data, tmp_path / name, report["root_hash"])
        assert verified.status == 0
        assert verified.out == f"{data}: verified, {report['root_hash']}\n"
        assert ipe_emu("verity", "dm", "verify", data, tmp_path / name, digits).status == 0


def test_format_behind_the_data_of_the_same_image(ipe_emu: Run, data: Path) -> None:
    content = data.read_bytes()
    done = ipe_emu("verity", "dm", "format", "--hash-offset", SIZE, "--data-blocks", 200, "--json", data, data)
    assert done.status == 0, done.err
    assert data.read_bytes()[:SIZE] == content
    where = ("--hash-offset", SIZE)
    root = json.loads(done.out)["root_hash"]
    assert ipe_emu("verity", "dm", "verify", *where, data, data, root).status == 0
    assert ipe_emu("verity", "dm", "roothash", *where, data, data).out.strip() == root
    again = ipe_emu("verity", "dm", "format", "--data-blocks", 200, *where, data, data)
    assert again.status == 2
    assert "--force overwrites" in again.err
    assert ipe_emu("verity", "dm", "format", "--data-blocks", 200, *where, "--force", data, data).status == 0


def test_format_leaves_nothing_behind_when_it_fails(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "hash.img"
    for options in (("--data-blocks", 300), ("--hash", "sha257"), ("--hash-offset", 100), ("--salt", "abc")):
        done = ipe_emu("verity", "dm", "format", *options, data, target)
        assert done.status == 2
        assert str(options[1]) in done.err
        assert not target.exists()
    over = ipe_emu("verity", "dm", "format", "--force", "--hash-offset", 4096, data, data)
    assert over.status == 2
    assert "hash offset is 4096" in over.err
    assert data.stat().st_size == SIZE


def test_format_overwrites_nothing_unasked(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "hash.img"
    target.write_text("precious")
    refused = ipe_emu("verity", "dm", "format", data, target)
    assert refused.status == 2
    assert "exists" in refused.err
    assert target.read_text() == "precious"
    assert ipe_emu("verity", "dm", "format", "--force", data, target).status == 0


def test_without_a_superblock(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    tree = ("--no-superblock", "--salt", "c0ffee", "--format", 0, "--hash-block-size", 1024)
    done = ipe_emu("verity", "dm", "format", *tree, data, tmp_path / "hash")
    root = root_hash(ipe_emu, data, *tree[1:])
    assert root.partition(":")[2] in done.out
    assert ipe_emu("verity", "dm", "verify", *tree, data, tmp_path / "hash", root).status == 0
    other_salt = ipe_emu("verity", "dm", "verify", *tree, "--salt", "c0ffef", data, tmp_path / "hash", root)
    assert other_salt.status == 1
    with_superblock = ipe_emu("verity", "dm", "verify", data, tmp_path / "hash", root)
    assert with_superblock.status == 2
    assert "no superblock: signature is" in with_superblock.err
    assert ipe_emu("verity", "dm", "format", "--no-superblock", "--uuid", IDENTITY, data, tmp_path / "x").status == 2


def test_roothash_takes_the_superblocks_word(ipe_emu: Run, data: Path, hash_image: Path) -> None:
    report = json.loads(ipe_emu("verity", "dm", "roothash", "--json", data, hash_image).out)
    assert len(report["salt"]) == 64
    verified = ipe_emu("verity", "dm", "verify", "--json", data, hash_image, report["root_hash"])
    assert json.loads(verified.out) == {
        "kernel": "op-policy", **report, "signature": "none", "verified": True
    }  # fmt: skip
    contradicted = ipe_emu("verity", "dm", "roothash", "--salt", "00", data, hash_image)
    assert contradicted.status == 2
    assert "--salt: the superblock says this" in contradicted.err


def test_verify_names_the_bad_block(ipe_emu: Run, data: Path, hash_image: Path) -> None:
    root = ipe_emu("verity", "dm", "roothash", data, hash_image).out.strip()
    spoil(data, 7 * 4096 + 5)
    done = ipe_emu("verity", "dm", "verify", data, hash_image, root)
    assert done.status == 1
    assert done.out == ""
    assert "data block 7 (at byte 28672) is corrupted" in done.err
    assert "(the kernel answers EIO)" in done.err
    report = json.loads(ipe_emu("verity", "dm", "verify", "--json", data, hash_image, root).out)
    assert (report["verified"], report["area"], report["block"], report["errno"]) == (False, "data", 7, "EIO")
    spoil(data, 7 * 4096 + 5)
    spoil(hash_image, 4096 + 3)
    report = json.loads(ipe_emu("verity", "dm", "verify", "--json", data, hash_image, root).out)
    assert (report["area"], report["level"], report["block"]) == ("hash tree", 1, 0)


def test_verify_names_both_root_hashes(ipe_emu: Run, data: Path, hash_image: Path) -> None:
    root = ipe_emu("verity", "dm", "roothash", data, hash_image).out.strip().partition(":")[2]
    done = ipe_emu("verity", "dm", "verify", data, hash_image, "ab" * 32)
    assert done.status == 1
    assert f"root hash is {root}, not {'ab' * 32}" in done.err


@pytest.mark.parametrize("bad", ["AB" * 32, "ab", "sha512:" + "ab" * 64, "word"])
def test_verify_with_what_is_no_root_hash(ipe_emu: Run, data: Path, hash_image: Path, bad: str) -> None:
    done = ipe_emu("verity", "dm", "verify", data, hash_image, bad)
    assert done.status == 2
    assert bad in done.err


def test_verify_with_images_that_are_none(ipe_emu: Run, data: Path, hash_image: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for wrong, complaint in (
        (tmp_path, "neither a regular file nor a block device"),
        (tmp_path / "fifo", "neither a regular file nor a block device"),
        (tmp_path / "missing", "No such file"),
    ):
        for images in ((wrong, hash_image), (data, wrong)):
            done = ipe_emu("verity", "dm", "verify", *images, "ab" * 32)
            assert done.status == 2
            assert complaint in done.err
    os.truncate(data, SIZE - 1)
    done = ipe_emu("verity", "dm", "verify", data, hash_image, "ab" * 32)
    assert done.status == 2
    assert (
        f"data.img: number of data blocks is 200, {SIZE} bytes with blocks of 4096; the image has {SIZE - 1}"
        in done.err
    )
    assert ipe_emu("verity", "dm", "roothash", tmp_path / "fifo").status == 2


def sign(root: str, output: Path, name: str = "trusted") -> None:
    subprocess.run(
        ["openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-outform", "der",
         "-inkey", KEYS / f"{name}.key", "-signer", KEYS / f"{name}.pem", "-out", output],
        input=root.partition(":")[2].encode(), check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def test_signed_root_hashes(ipe_emu: Run, data: Path, hash_image: Path, tmp_path: Path) -> None:
    root = ipe_emu("verity", "dm", "roothash", data, hash_image).out.strip()
    sign(root, tmp_path / "p7s")
    verify = ("verity", "dm", "verify", "--json", "--root-hash-signature", tmp_path / "p7s")
    images = (data, hash_image, root)
    trusted = KEYS / "trusted.pem"
    for keyring in ("--builtin-keys", "--secondary-keys", "--platform-keys", "--dm-verity-keys"):
        done = ipe_emu(*verify, keyring, trusted, *images)
        assert done.status == 0, done.err
        assert json.loads(done.out)["signature"] == "verified"
    for keys in ((), ("--fsverity-keys", trusted), ("--builtin-keys", KEYS / "untrusted.pem")):
        done = ipe_emu(*verify, *keys, *images)
        assert done.status == 1
        report = json.loads(done.out)
        assert (report["verified"], report["signature"], report["errno"]) == (False, "refused", "ENOKEY")
    old = ipe_emu(*verify, "--kernel", "linux-6.12", "--dm-verity-keys", trusted, *images)
    assert old.status == 2
    assert "no such keyring" in old.err
    missing = ipe_emu("verity", "dm", "verify", "--root-hash-signature", tmp_path / "none", *images)
    assert missing.status == 2
    spoil(data, 0)
    spoiled = ipe_emu(*verify, "--builtin-keys", trusted, *images)
    assert spoiled.status == 1
    assert json.loads(spoiled.out)["block"] == 0


def test_a_signature_of_another_root_hash(ipe_emu: Run, data: Path, hash_image: Path, tmp_path: Path) -> None:
    root = ipe_emu("verity", "dm", "roothash", data, hash_image).out.strip()
    sign("sha256:" + "ab" * 32, tmp_path / "p7s")
    done = ipe_emu(
        "verity", "dm", "verify", "--root-hash-signature", tmp_path / "p7s", "--builtin-keys", KEYS / "trusted.pem",
        data, hash_image, root,
    )  # fmt: skip
    assert done.status == 1
    assert "signature of the root hash" in done.err
    assert "EKEYREJECTED" in done.err


def test_large_data_blocks_are_remarked_on(ipe_emu: Run, data: Path) -> None:
    done = ipe_emu("verity", "dm", "roothash", "--data-block-size", 8192, data)
    assert done.status == 0
    assert "data blocks are larger than 4096 bytes" in done.err


def test_fs_digest_prints_what_fsverity_prints(ipe_emu: Run, tmp_path: Path) -> None:
    files = [random_file(tmp_path / str(size), size) for size in (0, 1, 4095, 4096, 4097, (1 << 20) + 1)]
    for options in ((), ("--hash-alg=sha512",), ("--block-size=1024", "--salt=c0ffee"), ("--block-size=65536",)):
        ours = ipe_emu("verity", "fs", "digest", *options, *files)
        assert ours.status == 0
        assert ours.out == tool("fsverity", "digest", *options, *files).stdout
    report = json.loads(ipe_emu("verity", "fs", "digest", "--json", files[0]).out)
    assert report == {"files": [{"file": str(files[0]), "digest": ours_of(ipe_emu, files[0]), "sealed": None}]}


def ours_of(ipe_emu: Run, path: Path) -> str:
    return ipe_emu("verity", "fs", "digest", path).out.split()[0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--block-size=512"], "block size is 512"),
        (["--block-size=4095"], "block size is 4095"),
        (["--block-size=131072"], "block size is 131072"),
        (["--block-size=0"], "block size is 0"),
        ([f"--salt={'00' * 33}"], "salt has 33 bytes"),
        (["--salt=abc"], "'abc'"),
        (["--hash-alg=sha1"], "sha1"),
    ],
)
def test_fs_digest_refuses(ipe_emu: Run, data: Path, options: list[str], complaint: str) -> None:
    done = ipe_emu("verity", "fs", "digest", *options, data)
    assert done.status == 2
    assert complaint in done.err


def test_fs_digest_is_for_regular_files(ipe_emu: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        done = ipe_emu("verity", "fs", "digest", path)
        assert done.status == 2
        assert str(path) in done.err


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_fs_sign_makes_what_fsverity_makes(ipe_emu: Run, data: Path, tmp_path: Path, algorithm: str) -> None:
    key, certificate = KEYS / "trusted.key", KEYS / "trusted.pem"
    options = (f"--hash-alg={algorithm}", "--block-size=1024", "--salt=c0ffee")
    ours = ipe_emu("verity", "fs", "sign", "--key", key, "--cert", certificate, *options, data)
    assert ours.status == 0, ours.err
    theirs = tool("fsverity", "sign", data, tmp_path / "theirs", f"--key={key}", f"--cert={certificate}", *options)
    assert theirs.returncode == 0, theirs.stderr
    made = Path(f"{data}.sig")
    assert made.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert stat.S_IMODE(made.stat().st_mode) & 0o111 == 0
    again = ipe_emu("verity", "fs", "sign", "--key", key, "--cert", certificate, *options, data)
    assert again.status == 2
    assert "exists" in again.err
    forced = ipe_emu("verity", "fs", "sign", "--key", key, "--cert", certificate, "--force", "--json", data)
    assert forced.status == 0
    assert json.loads(forced.out)["signature"] == str(made)


def test_fs_sign_refuses_a_key_of_somebody_else(ipe_emu: Run, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(new_test_key("other")[0])
    done = ipe_emu("verity", "fs", "sign", "--key", other, "--cert", KEYS / "trusted.pem", data)
    assert done.status == 2
    assert "does not belong" in done.err
    assert not Path(f"{data}.sig").exists()


def test_names_cannot_break_lines(ipe_emu: Run, tmp_path: Path) -> None:
    evil = tmp_path / "a\nsha256:00 b\x1b[m"
    evil.write_bytes(b"x")
    done = ipe_emu("verity", "fs", "digest", evil)
    assert len(done.out.splitlines()) == 1
    assert "\x1b" not in done.out
    assert "\x1b" not in ipe_emu("verity", "dm", "roothash", evil).err


def test_with_stdin_closed_it_is_the_same(data: Path, tmp_path: Path) -> None:
    """The image then is descriptor 0, and must not become what a worker takes for its stdin."""
    large = tmp_path / "large"
    large.write_bytes(data.read_bytes() * 50)
    reference = spawn("verity", "dm", "roothash", large)
    assert reference.returncode == 0, reference.stderr
    closed = spawn("verity", "dm", "roothash", large, preexec_fn=lambda: os.close(0))
    assert (closed.returncode, closed.stdout) == (0, reference.stdout)
