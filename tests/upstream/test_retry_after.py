"""For how long an upstream asks to be left alone, by its headers."""

from __future__ import annotations

import email.utils
import math
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.headers import Headers
from redbtc.upstream.retry_after import retry_after_seconds, seconds_of_go

pytestmark = pytest.mark.promise_9

HTTP, RFC_850, ASCTIME = (
    "%a, %d %b %Y %H:%M:%S GMT",
    "%A, %d-%b-%y %H:%M:%S GMT",
    "%a %b %d %H:%M:%S %Y",
)


def told(**headers: str) -> float | None:
    """Return what headers say; `_` stands for `-` in their names."""
    return retry_after_seconds(
        [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    )


def test_nothing_is_said() -> None:
    assert retry_after_seconds([]) is None
    assert told(content_type="text/plain") is None
    assert told(retry_after="", retry_after_ms="") is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("20", 20.0), ("0.5", 0.5), ("1.500", 1.5), (" 7 ", 7.0), ("86400", 86400.0), ("007", 7.0)],
)
def test_seconds(value: str, seconds: float) -> None:
    assert told(retry_after=value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("0", "0.0", "-1", "-0", "nan", "inf", "-inf", "Infinity", "1e309", "1e3", "+5", "1_0"),
        *("0x10", "1,5", "1 2", "5s", "soon", "\u0661\u0662", "\u00b2", "1;2", ".", "--1"),
        *("Sun, 06 Nov 1994", "99 Foo 2026 00:00:00 GMT", "Mon, 32 Jan 2040 00:00:00 GMT", ","),
        *("Sun, 06 Nov 99999 08:49:37 GMT", "Sun, 06 Nov 2040 08:49:37 +9999999999", "9" * 65),
    ],
)
def test_values_that_say_nothing(value: str) -> None:
    assert told(retry_after=value) is None
    assert told(retry_after_ms=value) is None


def test_absurd_values_are_numbers_at_most() -> None:
    assert told(retry_after="1" + 18 * "0") == 1e18
    assert told(retry_after="9" * 10_000_000) is None
    assert told(retry_after_ms="9" * 10_000_000, retry_after="3") == 3


@pytest.mark.parametrize("form", [HTTP, RFC_850, ASCTIME])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_dates_in_the_three_forms_of_http(
    form: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 9110, section 5.6.7. All of them are in UTC, wherever the gateway is."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        at = datetime.now(UTC) + timedelta(seconds=300)
        seconds = told(retry_after=at.strftime(form))
        assert seconds is not None
        assert 200 < seconds <= 300
        past = datetime.now(UTC) - timedelta(seconds=2)
        assert told(retry_after=past.strftime(form)) is None
    finally:
        monkeypatch.undo()
        time.tzset()


def test_milliseconds_come_first() -> None:
    assert told(retry_after_ms="1500", retry_after="9") == 1.5
    assert told(retry_after_ms="0.5") == 0.0005
    assert told(retry_after_ms="no", retry_after="9") == 9


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("12ms", 0.012),
        ("1.5s", 1.5),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("250us", 0.00025),
        ("1h", 3600.0),
        ("60", 60.0),
        ("0s", 0.0),
    ],
)
def test_durations(duration: str, seconds: float) -> None:
    assert seconds_of_go(duration) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "1", "1 s", "-1s", "1d", "1s2", "1_0s", "nan", "\u0661s", "1.s", "1s,2s"]
)
def test_texts_that_are_no_durations(text: str) -> None:
    assert seconds_of_go(text) == (1.0 if text == "1" else None)


def test_the_latest_reset_of_what_is_used_up_counts() -> None:
    resets = {"x_ratelimit_reset_requests": "2s", "x_ratelimit_reset_tokens": "6m0s"}

    def remaining(requests: str, tokens: str) -> dict[str, str]:
        return {"x_ratelimit_remaining_requests": requests, "x_ratelimit_remaining_tokens": tokens}

    assert told(**resets, **remaining("0", "0")) == 360
    assert told(**resets, **remaining("0", "1000")) == 2
    assert told(**resets, **remaining("9", "0")) == 360
    assert told(**resets, **remaining("9", "9")) is None
    assert told(**resets, **remaining("no", "-1")) is None
    assert told(**resets) == 360, "without a remainder, the limit counts as used up"
    assert told(**resets, **remaining("0", "0"), retry_after="5") == 5
    assert told(**resets, **remaining("0", "0"), retry_after="soon") == 360
    assert told(x_ratelimit_reset_tokens="0s") is None


def test_the_first_of_several_headers_counts() -> None:
    assert retry_after_seconds([(b"Retry-After", b"3"), (b"retry-after", b"9")]) == 3
    assert retry_after_seconds([(b"RETRY-AFTER", b"9" * 100), (b"retry-after", b"9")]) == 9


NAMES = [
    b"retry-after",
    b"Retry-After-Ms",
    b"x-ratelimit-reset-tokens",
    b"x-ratelimit-reset-requests",
    b"x-ratelimit-remaining-tokens",
]
VALUES = st.one_of(
    st.binary(max_size=70),
    st.text(max_size=40).map(str.encode),
    st.text("0123456789.smhu:-+eE_ ,GMTJanSu", max_size=40).map(str.encode),
    st.floats().map(lambda number: str(number).encode()),
    st.datetimes().map(lambda at: email.utils.format_datetime(at).encode()),
)


@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6))
def test_any_headers_give_a_number_or_nothing(headers: Headers) -> None:
    seconds = retry_after_seconds(headers)
    assert seconds is None or (seconds > 0 and math.isfinite(seconds))


@given(st.integers(1, 10**9))
def test_any_number_of_seconds_is_understood(seconds: int) -> None:
    assert told(retry_after=str(seconds)) == seconds
    assert told(retry_after_ms=str(seconds)) == seconds / 1000
    assert told(x_ratelimit_reset_tokens=f"{seconds}s", x_ratelimit_remaining_tokens="0") == (
        seconds if seconds < 10**9 else None
    )


@given(st.integers(0, 1000), st.integers(0, 59), st.integers(0, 59), st.integers(1, 999))
def test_any_duration_of_go_is_understood(
    hours: int, minutes: int, seconds: int, milliseconds: int
) -> None:
    written = f"{hours}h{minutes}m{seconds}.{milliseconds:03}s"
    expected = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    assert seconds_of_go(written) == pytest.approx(expected)


@given(st.integers(10, 10**8))
def test_any_date_is_understood(seconds: int) -> None:
    found = told(retry_after=email.utils.formatdate(time.time() + seconds, usegmt=True))
    assert found is not None
    assert seconds - 300 < found <= seconds
