"""What the cursor takes and refuses, one peculiarity each."""

import errno
from collections.abc import Callable

import pytest

from ipe_emu.errors import KernelError
from ipe_emu.pkcs7 import ber, oids
from ipe_emu.pkcs7.ber import Cursor


def take_any(data: bytes) -> bytes:
    element = Cursor(data, "test").anything()
    return data[element.start : element.end]


def take_integer(data: bytes) -> bytes:
    return Cursor(data, "test").primitive(ber.INTEGER)


def take_empty_sequence(data: bytes) -> bytes:
    cursor = Cursor(data, "test")
    return cursor.leave(cursor.enter(ber.SEQUENCE))


@pytest.mark.parametrize(
    ("take", "data", "content"),
    [
        pytest.param(take_integer, "020101", "01", id="short"),
        pytest.param(take_integer, "02810101", "01", id="length_not_minimal"),
        pytest.param(take_integer, "0282000101", "01", id="length_of_two_octets"),
        pytest.param(take_integer, "02010199", "01", id="bytes_behind"),
        pytest.param(take_empty_sequence, "3000", "", id="empty"),
        pytest.param(take_empty_sequence, "1000", "", id="constructed_bit_missing"),
        pytest.param(take_empty_sequence, "30800000", "", id="indefinite"),
        pytest.param(take_any, "0000", "", id="any_takes_end_of_contents"),
        pytest.param(take_any, "24800401410000", "0401410000", id="indefinite_counts_its_end"),
        pytest.param(take_any, "3080308000000000", "308000000000", id="indefinite_in_indefinite"),
        pytest.param(take_any, "3080bf810100 0000".replace(" ", ""), "bf8101000000", id="long_tag_inside"),
        pytest.param(
            take_any, "30800487000000000000014100 00".replace(" ", ""), "048700000000000001410000", id="length7"
        ),
    ],
)
def test_taken(take: Callable[[bytes], bytes], data: str, content: str) -> None:
    assert take(bytes.fromhex(data)).hex() == content


@pytest.mark.parametrize(
    ("take", "data", "reason"),
    [
        pytest.param(take_integer, "", "ends", id="nothing"),
        pytest.param(take_integer, "02", "ends", id="tag_only"),
        pytest.param(take_integer, "0202", "2 bytes where 0", id="cut_off"),
        pytest.param(take_integer, "0281", "inside a length", id="length_cut_off"),
        pytest.param(take_integer, "028300000101", "more than two octets", id="length_of_three_octets"),
        pytest.param(take_integer, "02800000", "primitive element of indefinite", id="primitive_indefinite"),
        pytest.param(take_integer, "22030201", "tag 0x22 where 0x02", id="constructed_integer"),
        pytest.param(take_integer, "1f020101", "more than one octet", id="long_tag"),
        pytest.param(take_empty_sequence, "3003020101", "too many", id="too_many"),
        pytest.param(
            take_empty_sequence, "308002010100 00".replace(" ", ""), "no end-of-contents", id="indefinite_too_many"
        ),
        pytest.param(take_empty_sequence, "30800001", "with a length", id="end_with_length"),
        pytest.param(take_empty_sequence, "308000", "ends", id="half_an_end"),
        pytest.param(take_any, "3080020101", "before the end-of-contents", id="no_end"),
        pytest.param(take_any, "308002800000", "primitive element of indefinite", id="primitive_indefinite_inside"),
        pytest.param(take_any, "308004880000000000000001410000", "more than seven", id="length8"),
        pytest.param(take_any, "30800405414141", "5 bytes where", id="inside_cut_off"),
        pytest.param(take_any, "30801f8181", "inside a tag", id="long_tag_cut_off"),
        pytest.param(take_any, "308004820000", "before the end", id="end_missing_after_empty"),
        pytest.param(take_any, "3080048200", "inside a length", id="inside_length_cut_off"),
    ],
)
def test_refused(take: Callable[[bytes], bytes], data: str, reason: str) -> None:
    with pytest.raises(KernelError, match=reason) as refused:
        take(bytes.fromhex(data))
    assert refused.value.errno == errno.EBADMSG
    assert refused.value.function == "asn1_ber_decoder"


def test_optional_elements() -> None:
    cursor = Cursor(bytes.fromhex("020105"), "test")
    assert cursor.optional_primitive(ber.BOOLEAN) is None
    assert cursor.optional_enter(ber.SET, ber.SEQUENCE) is None
    assert cursor.optional_primitive(ber.INTEGER) == b"\5"
    assert cursor.at_end
    assert cursor.optional_anything() is None
    assert cursor.optional_enter(ber.SEQUENCE) is None


def test_object_identifiers_are_encoded_as_x690_says() -> None:
    assert oids.encode("2.999.3").hex() == "883703"
    assert oids.encode("1.2.840.113549").hex() == "2a864886f70d"
    assert oids.encode("2.5.4.3").hex() == "550403"
