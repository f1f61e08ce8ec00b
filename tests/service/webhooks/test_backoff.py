from datetime import UTC, datetime, timedelta

from service.webhooks.backoff import Backoff

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def test_waits_double_up_to_an_hour_and_jitter_takes_up_to_half() -> None:
    def wait_s(num_failures: int, jitter: float) -> float:
        retry_at = Backoff().next_try(num_failures, NOW, NOW, jitter)
        assert retry_at is not None
        return (retry_at - NOW).total_seconds()

    assert [wait_s(n, 0.0) for n in (0, 1, 2, 9, 10, 1000)] == [5, 10, 20, 2560, 3600, 3600]
    assert [wait_s(n, 0.5) for n in (0, 1, 10)] == [3.75, 7.5, 2700]
    assert [Backoff().pause_s(n) for n in (1, 2, 4, 5, 1000)] == [5, 10, 40, 60, 60]


def test_tries_go_on_for_a_day_to_its_last_second_and_then_no_more() -> None:
    now, tries, since = NOW, 0, None
    while (later := Backoff().next_try(tries, since, now, 0.0)) is not None:
        assert later > now
        since, now, tries = since or now, later, tries + 1
    assert now == NOW + timedelta(days=1)
    # 5 + 10 + ... + 2560 s are 10 waits and 5115 s; 22 hours of the remaining 81285 s are whole, and one is cut short.
    assert tries == 10 + 22 + 1
