"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcore
from kvcore.units import AUTO_SHARE, available_memory, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        (2**70, 2**70),
        ("1", 1),
        ("512B", 512),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1 kib", 1024),
        ("2GiB", 2 * 2**30),
        ("  2  GiB ", 2 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("0.5 MB", 500_000),
        ("3TB", 3 * 10**12),
        ("3TiB", 3 * 2**40),
        ("512 MB", 512 * 10**6),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@given(n=st.integers(1, 10**15))
def test_large_sizes_are_exact(n):
    assert parse_bytes(str(n)) == n
    assert parse_bytes(f"{n}B") == n
    assert parse_bytes(f"{n}KiB") == 1024 * n


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "2 Gibs", "2G iB", "-1GiB", "1e9", "2,5GiB", "0", "0GiB", "0.0001B", "nan", "inf",
     "auto ", "AUTO!", "1 2", 0, -1],
)  # fmt: skip
def test_what_is_no_size(text):
    with pytest.raises(kvcore.InvalidArgument, match=r"^memory: expected"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [1.5, None, True, b"2GiB", [1]])
def test_what_is_neither_number_nor_text(value):
    with pytest.raises(kvcore.InvalidType, match=r"^memory: expected"):
        parse_bytes(value)


def test_the_message_names_the_argument():
    with pytest.raises(kvcore.InvalidArgument, match=r"^budget: "):
        parse_bytes("much", "budget")


def test_auto_is_a_share_of_what_is_available():
    available = available_memory()
    assert available > 2**20
    assert parse_bytes("auto") == pytest.approx(AUTO_SHARE * available, rel=0.3)
    assert parse_bytes("auto", available=lambda: 1000) == AUTO_SHARE * 1000


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**31, "2 GiB"),
        (2**40, "1 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_format(nbytes, text):
    assert format_bytes(nbytes) == text


@given(n=st.integers(1, 2**50))
def test_what_is_printed_can_be_read_again(n):
    text = format_bytes(n)
    assert "e" not in text.split()[0]
    assert parse_bytes(text) == pytest.approx(n, rel=1e-3, abs=1)
