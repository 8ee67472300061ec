from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_bytes, format_duration_ns, parse_duration_ns


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("0", 0),
        ("1ns", 1),
        ("500us", 500_000),
        ("500µs", 500_000),
        ("10ms", 10_000_000),
        ("2s", 2_000_000_000),
        ("1m", 60_000_000_000),
        ("1h", 3_600_000_000_000),
        ("1.5 s", 1_500_000_000),
        (" 20ms ", 20_000_000),
    ],
)
def test_durations_are_read(text: str, expected_ns: int) -> None:
    assert parse_duration_ns(text) == expected_ns


@pytest.mark.parametrize(
    "text", ["", "10", "ms", "-1s", "1e3s", "10 minutes", "1,5s", "nan s", "infs", "9" * 400 + "s"]
)
def test_what_is_no_duration_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_duration_ns(text)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    try:
        assert parse_duration_ns(text) >= 0
    except UsageError as error:
        assert "500us" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("duration_ns", "expected"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1.00 us"),
        (12_345, "12.3 us"),
        (123_456, "123 us"),
        (999_499, "999 us"),
        (999_500, "1.00 ms"),
        (999_600_000, "1.00 s"),
        (1_434_000_000, "1.43 s"),
        (9_996_000_000, "10.0 s"),
        (3_600_000_000_000, "3,600 s"),
        (-1_500_000, "-1.50 ms"),
    ],
)
def test_durations_have_three_digits_and_a_fitting_unit(duration_ns: float, expected: str) -> None:
    assert format_duration_ns(duration_ns) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (2_660_000_000, "2.66 GB"),
        (10**12, "1.00 TB"),
        (10**16, "10,000 TB"),
    ],
)
def test_bytes_are_in_powers_of_1000(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@settings(deadline=None)
@given(st.integers(0, 10**17))
def test_a_duration_written_is_the_duration_read_within_its_digits(duration_ns: int) -> None:
    written = format_duration_ns(duration_ns)
    assert parse_duration_ns(written.replace(",", "")) == pytest.approx(duration_ns, rel=0.006, abs=0.5)
