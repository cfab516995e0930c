"""fs-verity digests and signatures against the program fsverity, and values it printed before (1.5, Debian)."""

import errno
import itertools
import os
import random
from pathlib import Path

import pytest

from ipe_emu.errors import KernelError, UserError
from ipe_emu.integrity.facts import Digest
from ipe_emu.integrity.fsverity import MAX_SIGNATURE_SIZE, measure, sealed_digest
from ipe_emu.integrity.fsverity_signature import formatted_digest, verify_signature
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.linux.fsverity import measure_verity
from ipe_emu.pkcs7.sign import sign_detached, sign_policy
from tests.integrity.tools import opened, random_file, tool
from tests.vectors import KEYS

FSVERITY_SAID: list[tuple[int, str, int, bytes, str]] = [
    (0, "sha256", 4096, b"", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
    (1, "sha256", 4096, b"", "0edb82071407a15a5898b90f1e04344c59919fe110d15b66d62d9c56525687f5"),
    (4095, "sha256", 4096, b"", "28c1a7d948e415b82109f8370b08e612dac53ebda3d026e27527e17f84e95d9e"),
    (4096, "sha256", 4096, b"", "16ad3fec8e3a330a6ab76a2a77e8887aeca515b046846b723551dae7c76c5141"),
    (4097, "sha256", 4096, b"", "c018eb3d709b7668cc72283bb7f1a785b039f549de3d5526581b08599dc5f128"),
    (
        4097,
        "sha512",
        1024,
        b"salt",
        "115a6c1375c28a07fd9bd93e931d6e26063bbee7018e1828af0aaa8bd053aee94e1080216f4e707a26f758920b6b2a0fed51834f5df2ec9f4b080a17c56b660d",
    ),
    (524288, "sha256", 4096, b"", "9c1ebb6258016ce42ece00219bcce631c6bb8804c70bf4b135e9a3b1a92c1dd2"),
    (524289, "sha256", 4096, b"", "cf3292ef2a818091a16cd982644cd686831129d9f6d4a661201b294c01bef00c"),
    (
        1048576,
        "sha512",
        4096,
        b"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "5cd88f4fb6ca6d5438c7be89709850762b6372bd7c8f6ecded8952b447ea58a9e48057cdcb4f84a22b3661f06b9c3f24ce597cd62d64c06ae06d7d32db4e24d3",
    ),
    (1048577, "sha256", 1024, b"", "726a1567a019e630038b0dbe6a39cd9b68228cf624db510353d33127a83ccf44"),
]


@pytest.mark.parametrize("said", FSVERITY_SAID, ids=lambda said: "-".join(map(str, said[:4])))
def test_digest(tmp_path: Path, said: tuple[int, str, int, bytes, str]) -> None:
    size, algorithm, block_size, salt, digest = said
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert measure(fd, algorithm, block_size=block_size, salt=salt).value.hex() == digest
    finally:
        os.close(fd)


def test_an_algorithm_that_fsverity_lacks() -> None:
    with pytest.raises(KernelError, match="sha1"):
        measure(0, "sha1")


SIZES = (0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1)


@pytest.mark.parametrize("salt", [b"", b"x", bytes(range(32))], ids=["unsalted", "one byte", "32 bytes"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("block_size", [1024, 2048, 4096, 65536])
def test_the_program_says_the_same(tmp_path: Path, algorithm: str, block_size: int, salt: bytes) -> None:
    files = [random_file(tmp_path / str(size), size) for size in SIZES]
    options = [f"--hash-alg={algorithm}", f"--block-size={block_size}", *([f"--salt={salt.hex()}"] if salt else [])]
    said = tool("fsverity", "digest", *options, *files).stdout.splitlines()
    assert len(said) == len(SIZES)
    for path, line in zip(files, said, strict=True):
        with opened(path) as fd:
            assert f"{measure(fd, algorithm, block_size=block_size, salt=salt)} {path}" == line


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_large_file(tmp_path: Path, jobs: int) -> None:
    path = random_file(tmp_path / "large", (40 << 20) + 5)
    done: list[int] = []
    with opened(path) as fd:
        digest = measure(fd, "sha256", jobs=jobs, progress=done.append)
    assert f"{digest} {path}" == tool("fsverity", "digest", path).stdout.strip()
    assert sum(done) == (40 << 20) + 5


def test_a_gibibyte_of_nothing(tmp_path: Path) -> None:
    """fsverity (1.5, Debian) printed this digest for the same file."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 30)
    with opened(path) as fd:
        digest = measure(fd, "sha256", jobs=2)
    assert digest.value.hex() == "ec1faaf35eccc9b3486408c064d1a357e41825379fedfebe4c697df89f05d8db"


def test_a_file_too_large_for_its_tree(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, (4 << 40) + 1)
    with opened(path) as fd:
        with pytest.raises(KernelError, match="more than 8 levels") as caught:
            measure(fd, "sha512", block_size=1024)
        assert caught.value.name == "EFBIG"
        measure(fd, "sha512", block_size=2048)


@pytest.mark.parametrize("block_size", [-4096, 0, 1, 512, 4095, 131072])
def test_block_sizes_that_are_none(tmp_path: Path, block_size: int) -> None:
    with opened(random_file(tmp_path / "f", 10)) as fd, pytest.raises(UserError, match=f"block size is {block_size};"):
        measure(fd, "sha256", block_size=block_size)


def test_every_bit_counts(tmp_path: Path) -> None:
    path = random_file(tmp_path / "file", 9000)
    content = path.read_bytes()
    with opened(path) as fd:
        digest = measure(fd, "sha256", block_size=1024)
        rng = random.Random()
        for bit in rng.sample(range(9000 * 8), 1000):
            tampered = bytearray(content)
            tampered[bit // 8] ^= 1 << bit % 8
            path.write_bytes(tampered)
            assert measure(fd, "sha256", block_size=1024) != digest, f"bit {bit}"


def test_what_the_kernel_has_sealed() -> None:
    def answering(number: int, value: bytes = b"", error: int = 0) -> Digest | None:
        def measure_verity(_: int) -> tuple[int, bytes]:
            if error:
                raise OSError(error, os.strerror(error))
            return number, value

        return sealed_digest(0, measure_verity)

    assert answering(1, b"x" * 32) == Digest("sha256", b"x" * 32)
    assert answering(2, b"x" * 64) == Digest("sha512", b"x" * 64)
    for nothing in (errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP):
        assert answering(0, error=nothing) is None
    with pytest.raises(OSError, match="Input/output"):
        answering(0, error=errno.EIO)
    with pytest.raises(KernelError, match="number 7"):
        answering(7, b"x")


def test_a_file_that_is_not_sealed(tmp_path: Path) -> None:
    with opened(random_file(tmp_path / "file", 10)) as fd:
        assert sealed_digest(fd, measure_verity) is None


DIGEST = Digest("sha256", bytes(range(32)))


def keyring(*names: str) -> Keyrings:
    return Keyrings(fsverity=load_certificates([KEYS / f"{name}.pem" for name in names]))


def sign(content: bytes, name: str = "trusted", algorithm: str = "sha256") -> bytes:
    key, certificate = ((KEYS / f"{name}.{suffix}").read_bytes() for suffix in ("key", "pem"))
    return sign_detached(content, key, certificate, digest=algorithm)


@pytest.mark.parametrize(("size", "algorithm"), [*itertools.product((0, 1, 5000), ("sha256", "sha512"))], ids=str)
def test_the_programs_signatures(tmp_path: Path, size: int, algorithm: str) -> None:
    path = random_file(tmp_path / "file", size)
    key, certificate = KEYS / "trusted.key", KEYS / "trusted.pem"
    made = tool(
        "fsverity", "sign", path, tmp_path / "sig", f"--key={key}", f"--cert={certificate}", f"--hash-alg={algorithm}"
    )
    assert made.returncode == 0, made.stderr
    with opened(path) as fd:
        digest = measure(fd, algorithm)
    theirs = (tmp_path / "sig").read_bytes()
    verify_signature(digest, theirs, keyring("trusted"))
    assert sign(formatted_digest(digest), algorithm=algorithm) == theirs


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (formatted_digest(Digest("sha256", bytes(32))), "EKEYREJECTED"),
        (DIGEST.value, "EKEYREJECTED"),
        (DIGEST.value.hex().encode(), "EKEYREJECTED"),
        (formatted_digest(Digest("sha512", DIGEST.value)), "EKEYREJECTED"),
    ],
)
def test_a_signature_over_something_else(content: bytes, answer: str) -> None:
    with pytest.raises(KernelError) as caught:
        verify_signature(DIGEST, sign(content), keyring("trusted"))
    assert caught.value.name == answer


def test_who_may_sign() -> None:
    signature = sign(formatted_digest(DIGEST), "ec")
    verify_signature(DIGEST, signature, keyring("trusted", "ec"))
    for keys, answer in ((keyring("trusted"), "ENOKEY"), (Keyrings(builtin=keyring("ec").fsverity), "ENOKEY")):
        with pytest.raises(KernelError) as caught:
            verify_signature(DIGEST, signature, keys)
        assert caught.value.name == answer


def test_signatures_that_are_none() -> None:
    key, certificate = ((KEYS / f"trusted.{suffix}").read_bytes() for suffix in ("key", "pem"))
    attached = sign_policy(formatted_digest(DIGEST), key, certificate)
    for signature, answer in ((b"", "EBADMSG"), (attached, "EBADMSG"), (bytes(MAX_SIGNATURE_SIZE + 1), "EMSGSIZE")):
        with pytest.raises(KernelError) as caught:
            verify_signature(DIGEST, signature, keyring("trusted"))
        assert caught.value.name == answer
