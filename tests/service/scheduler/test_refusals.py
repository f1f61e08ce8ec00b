"""How long a refused launch waits before it is asked for again."""

from service.scheduler.refusals import Refusals


def test_each_wait_is_twice_the_last_and_none_is_longer_than_a_minute() -> None:
    refusals = Refusals()
    assert [refusals.note("job", 0.0) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_job_is_held_back_until_its_time_and_no_other_with_it() -> None:
    refusals = Refusals()
    refusals.note("job", 10.0)
    assert [refusals.hold_back("job", now_s) for now_s in (10.0, 10.9, 11.0)] == [True, True, False]
    assert not refusals.hold_back("other", 10.0)


def test_what_was_taken_or_is_over_begins_anew() -> None:
    refusals = Refusals()
    for job in ("taken", "over", "kept"):
        refusals.note(job, 0.0)
    refusals.forget("taken")
    refusals.forget_all_but({"taken", "kept"})
    assert [refusals.note(job, 0.0) for job in ("taken", "over", "kept")] == [1, 1, 2]
