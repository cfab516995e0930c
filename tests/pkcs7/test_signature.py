"""Faults of single signatures, and the signatures that only integers accept."""

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7.signature import PublicKey, Signature, public_key_verify_signature
from tests.pkcs7.der import seq, tlv

DIGEST = hashlib.sha256(b"signed").digest()
PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")


def integer(number: int) -> bytes:
    return tlv(2, number.to_bytes(number.bit_length() // 8 + 1))


def answer(key: PublicKey, value: bytes, *, algorithm: str = "rsa", hash_name: str = "sha256") -> str:
    try:
        public_key_verify_signature(key, Signature(value, algorithm, hash_name, DIGEST))
    except KernelError as error:
        return error.name
    return "ok"


class RsaPair:
    """An RSA key that signs any number, padded or not."""

    def __init__(self, bits: int) -> None:
        numbers = rsa.generate_private_key(65537, bits).private_numbers()
        self.n, self.e, self.d = numbers.public_numbers.n, numbers.public_numbers.e, numbers.d
        self.public = PublicKey("rsa", seq(integer(self.n), integer(self.e)))

    def sign(self, message: bytes, size: int) -> bytes:
        return pow(int.from_bytes(message), self.d, self.n).to_bytes(size)


@pytest.fixture(scope="module")
def rsa_1024() -> RsaPair:
    return RsaPair(1024)


def encoded(size: int, *, block: int = 1, prefix: bytes = PREFIX, digest: bytes = DIGEST) -> bytes:
    rest = b"\0" + prefix + digest
    return bytes([0, block]) + b"\xff" * (size - 2 - len(rest)) + rest


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param(encoded(128), "ok", id="good"),
        pytest.param(encoded(128, block=2), "EBADMSG", id="block_type"),
        pytest.param(encoded(128, prefix=PREFIX[:-1] + b"\x21"), "EBADMSG", id="digest_info"),
        pytest.param(encoded(128, prefix=b""), "EBADMSG", id="no_digest_info"),
        pytest.param(encoded(128, digest=DIGEST[::-1]), "EKEYREJECTED", id="other_digest"),
        pytest.param(encoded(128, digest=DIGEST + b"\0"), "EKEYREJECTED", id="longer_digest"),
        pytest.param(
            (b"\0\1" + b"\xff" * 8 + b"\0" + PREFIX + DIGEST).ljust(128, b"\0"), "EKEYREJECTED", id="garbage_tail"
        ),
        pytest.param(
            (b"\0\1" + b"\xff" * 7 + b"\0" + PREFIX + DIGEST).ljust(128, b"\0"), "EBADMSG", id="short_padding"
        ),
        pytest.param(b"\0\1" + b"\xff" * 126, "EBADMSG", id="padding_only"),
        pytest.param(b"\1" + encoded(128)[1:], "EINVAL", id="first_byte"),
    ],
)
def test_rsa(rsa_1024: RsaPair, message: bytes, expected: str) -> None:
    assert answer(rsa_1024.public, rsa_1024.sign(message, 128)) == expected


def test_rsa_numbers_out_of_range(rsa_1024: RsaPair) -> None:
    for number in (0, 1, rsa_1024.n - 1, rsa_1024.n, 2**1024 - 1):
        assert answer(rsa_1024.public, number.to_bytes(128)) == "EINVAL"
    good = rsa_1024.sign(encoded(128), 128)
    assert answer(rsa_1024.public, b"\0" + good) == "EINVAL"
    assert answer(rsa_1024.public, good[1:]) == "EINVAL"


def test_a_modulus_is_rounded_up_to_64_bits() -> None:
    # mpi_get_size counts limbs: with 2040 bits the kernel wants 256 bytes, and looks for the padding at their start.
    pair = RsaPair(2040)
    assert answer(pair.public, pair.sign(encoded(255), 255)) == "EINVAL"
    assert answer(pair.public, pair.sign(encoded(255), 256)) == "EBADMSG"
    assert answer(pair.public, pair.sign(encoded(256), 256)) == "ok"
    assert answer(pair.public, pair.sign(encoded(256, digest=DIGEST[::-1]), 256)) == "EKEYREJECTED"


@pytest.mark.parametrize("exponent", [0, 1, 2, 4, 2**255 + 95])
def test_unusual_exponents_verify_nothing_here(rsa_1024: RsaPair, exponent: int) -> None:
    key = PublicKey("rsa", seq(integer(rsa_1024.n), integer(exponent)))
    assert answer(key, rsa_1024.sign(encoded(128), 128)) in {"EINVAL", "EBADMSG"}


def test_an_exponent_of_one_shows_its_message() -> None:
    # The kernel computes m^1 as any other power; OpenSSL refuses the key.
    key = PublicKey("rsa", seq(integer(2**1024 - 105), integer(1)))
    assert answer(key, encoded(128)) == "ok"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(b"", "EBADMSG", id="empty"),
        pytest.param(seq(tlv(2), integer(3)), "EINVAL", id="empty_modulus"),
        pytest.param(seq(integer(2**1023 + 1), tlv(2)), "EINVAL", id="empty_exponent"),
        pytest.param(seq(integer(255), integer(65537)), "EINVAL", id="exponent_longer_than_modulus"),
        pytest.param(seq(integer(2**1023 + 1), integer(3), integer(3)), "EBADMSG", id="third_number"),
        pytest.param(seq(integer(0), integer(0)), "EINVAL", id="zero"),
        pytest.param(seq(integer(2**2055), integer(3)), "EINVAL", id="size_not_in_list"),
        pytest.param(seq(integer(2**1023 + 1), integer(2**256)), "EINVAL", id="exponent_too_large_for_us"),
        pytest.param(seq(integer(2**16385), integer(3)), "ENOMEM", id="modulus_too_large"),
    ],
)
def test_rsa_keys(key: bytes, expected: str) -> None:
    assert answer(PublicKey("rsa", key), bytes(128)) == expected


def test_algorithms_that_do_not_fit(rsa_1024: RsaPair) -> None:
    good = rsa_1024.sign(encoded(128), 128)
    assert answer(rsa_1024.public, good, algorithm="ecdsa") == "EKEYREJECTED"
    assert answer(PublicKey("ecdsa-nist-p256", b""), good) == "EKEYREJECTED"
    assert answer(rsa_1024.public, good, hash_name="sm3") == "EINVAL"
    assert answer(PublicKey("ecdsa-nist-p256", b""), good, algorithm="ecdsa", hash_name="sm3") == "EINVAL"
    gost = PublicKey("ecrdsa", b"")
    assert answer(gost, good, algorithm="ecrdsa", hash_name="streebog256") == "ENOENT"
    assert answer(gost, good, algorithm="ecrdsa") == "EINVAL"


CURVES = {
    "ecdsa-nist-p192": (ec.SECP192R1(), 24, 8),
    "ecdsa-nist-p256": (ec.SECP256R1(), 32, 8),
    "ecdsa-nist-p384": (ec.SECP384R1(), 48, 8),
    "ecdsa-nist-p521": (ec.SECP521R1(), 66, 9),
}


@pytest.mark.parametrize("name", CURVES)
def test_ecdsa(name: str) -> None:
    curve, size, _ = CURVES[name]
    private = ec.generate_private_key(curve)
    point = private.public_key().public_numbers()
    public = PublicKey(name, b"\4" + point.x.to_bytes(size) + point.y.to_bytes(size))
    digits = -(-size // 8) * 8

    def check(value: bytes, key: PublicKey = public) -> str:
        return answer(key, value, algorithm="ecdsa")

    r, s = utils.decode_dss_signature(private.sign(DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
    assert check(seq(integer(r), integer(s))) == "ok"
    assert check(seq(tlv(2, r.to_bytes(digits)), tlv(2, b"\0" + s.to_bytes(digits)))) == "ok"
    assert check(seq(integer(r), integer(s)) + b"behind") == "ok"
    assert check(seq(integer(s), integer(r))) == "EKEYREJECTED"
    assert check(seq(integer(0), integer(s))) == "EBADMSG"
    assert check(seq(integer(r), integer(0))) == "EBADMSG"
    # The order of each curve is its own, so the largest number that fits is never below it.
    assert check(seq(integer(r), tlv(2, b"\xff" * digits))) == "EBADMSG"
    assert check(seq(integer(r), tlv(2))) == "EINVAL"
    assert check(seq(tlv(2, b"\1" + bytes(digits)), integer(s))) == "EINVAL"
    assert check(seq(tlv(2, bytes(digits + 2)), integer(s))) == "EINVAL"
    assert check(seq(integer(r), integer(s), integer(s))) == "EBADMSG"
    assert check(b"") == "EBADMSG"

    good = seq(integer(r), integer(s))
    wider = b"\4" + point.x.to_bytes(digits) + point.y.to_bytes(digits)
    assert check(good, PublicKey(name, wider)) == "ok"
    for key in (
        b"",
        b"\4",
        public.data[:-1],
        b"\3" + public.data[1:],
        b"\4" + bytes(2 * size),
        public.data[:-1] + bytes([public.data[-1] ^ 1]),
        b"\4" + b"\xff" * (2 * digits),
        b"\4" + point.x.to_bytes(digits + 1) + point.y.to_bytes(digits + 1),
    ):
        assert check(good, PublicKey(name, key)) == "EINVAL", key.hex()


def test_coordinates_are_below_the_field_prime() -> None:
    # OpenSSL reduces them; ecc_is_pubkey_valid_partial does not.
    p = 2**256 - 2**224 + 2**192 + 2**96 - 1
    b = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
    x, y = next(
        (x, pow(x**3 - 3 * x + b, (p + 1) // 4, p)) for x in range(2, 99) if pow(x**3 - 3 * x + b, (p - 1) // 2, p) == 1
    )

    def check(point_x: int) -> str:
        key = PublicKey("ecdsa-nist-p256", b"\4" + point_x.to_bytes(32) + y.to_bytes(32))
        return answer(key, seq(integer(1), integer(1)), algorithm="ecdsa")

    assert check(x) == "EKEYREJECTED"
    assert check(x + p) == "EINVAL"
