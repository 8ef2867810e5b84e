"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.units import GIB, KIB, MIB, MemoryShare, format_bytes, parse_bytes, parse_memory


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("512MiB", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("8G", 8 * GIB),
        ("8GB", 8 * GIB),
        ("2kib", 2 * KIB),
        (" 4096 ", 4096),
        ("4096B", 4096),
        ("1 TiB", 1024 * GIB),
    ],
)
def test_sizes_are_binary_whatever_the_spelling(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1MiB", "1XiB", "1e9", "GiB", "1MiBs", "nan", "0x10"])
def test_a_bad_size_shows_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_bytes(text)


@given(st.integers(min_value=0, max_value=2**50))
def test_a_formatted_size_reads_back_within_its_one_decimal(n_bytes: int) -> None:
    again = parse_bytes(format_bytes(n_bytes))
    assert abs(again - n_bytes) <= max(1, n_bytes) * 0.051


@pytest.mark.parametrize(
    ("text", "meant"),
    [("80%", MemoryShare(80)), (" 12.5 %", MemoryShare(12.5)), ("100%", MemoryShare(100)), ("2GiB", 2 * GIB)],
)
def test_memory_is_a_size_or_a_share(text: str, meant: MemoryShare | int) -> None:
    assert parse_memory(text) == meant
    assert parse_memory(str(meant)) == meant


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "80 percent", "%", ""])
def test_bad_memory_shows_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="80%"):
        parse_memory(text)
