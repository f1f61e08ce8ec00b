"""Who starts, who waits and why: the queue judged against shares, quotas, jobs before and room."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import Job, JobState, Phase, Quota, Reason
from service.scheduler import Admission, admit
from service.scheduler.admission import line
from tests.service.scheduler.queued import cluster, job

R, P, S = Reason, Phase, JobState
JOB_A, JOB_B = ("job_" + letter * 26 for letter in "AB")


def names(jobs: Sequence[Job]) -> list[str]:
    return [j.id for j in jobs]


def queue(admission: Admission) -> list[tuple[str, Reason]]:
    """Those that wait, in order of their places."""
    assert [w.position for w in admission.waiting] == list(range(1, len(admission.waiting) + 1))
    return [(w.job.id, w.reason) for w in admission.waiting]


def test_jobs_start_in_the_order_they_came_while_there_is_room() -> None:
    admission = admit([job("a", 2), job("b", 2), job("c", 1)], [], cluster((4, 0)))
    assert names(admission.start) == ["a", "b"]
    assert queue(admission) == [("c", R.CLUSTER_FULL)]
    assert "1 workers do not fit beside its jobs" in admission.waiting[0].detail


def test_a_small_job_does_not_overtake_one_that_waits_for_room() -> None:
    admission = admit([job("big", 4), job("small", 1)], [job("now", 2)], cluster((4, 0)))
    assert names(admission.start) == []
    assert queue(admission) == [("big", R.CLUSTER_FULL), ("small", R.BEHIND_OTHERS)]


def test_a_job_larger_than_the_cluster_holds_back_nobody() -> None:
    admission = admit([job("huge", 9), job("small", 1, age_s=1), job("next", 4)], [], cluster((4, 0)))
    assert names(admission.start) == ["small"]
    assert queue(admission) == [("next", R.CLUSTER_FULL), ("huge", R.CLUSTER_FULL)]
    assert "the whole cluster holds 4" in admission.waiting[1].detail


def test_of_one_owners_jobs_the_greater_priority_goes_first_then_the_older() -> None:
    jobs = [job("old", age_s=3), job("low", age_s=2, priority=-1), job("high", age_s=1, priority=5), job("new")]
    assert names(line(jobs, [])) == ["high", "old", "new", "low"]


def test_the_owner_with_the_fewest_running_workers_goes_first() -> None:
    jobs = [job("a1", owner="a", age_s=9), job("a2", owner="a", age_s=8), job("b1", owner="b"), job("c1", owner="c")]
    running = [job("a0", 2, owner="a", state=S.RUNNING), job("c0", 1, owner="c", state=S.RUNNING)]
    assert names(line(jobs, running)) == ["b1", "c1", "a1", "a2"]
    assert names(line(jobs, [])) == ["a1", "b1", "c1", "a2"]


def test_priority_says_nothing_between_owners() -> None:
    jobs = [job("a1", owner="a", age_s=9), job("b1", owner="b", priority=100)]
    assert names(line(jobs, [])) == ["a1", "b1"]


def test_one_owners_hundred_jobs_delay_another_by_one_job() -> None:
    many = [job(f"a{n:03}", owner="a", age_s=1000 - n) for n in range(100)]
    assert names(line([*many, job("b", 2, owner="b"), job("c", 1, owner="b")], []))[:4] == ["a000", "b", "a001", "a002"]


def test_whoever_waits_for_room_keeps_its_place_when_the_shares_change() -> None:
    # a holds one worker in a long job; b's small jobs come and go, so b often holds fewer.
    long = job("a0", 1, owner="a", state=S.RUNNING)
    big = job("a1", 4, owner="a", age_s=5, reason=R.CLUSTER_FULL, queue_position=1)
    small = job("b1", 1, owner="b", reason=R.BEHIND_OTHERS, queue_position=2)
    held_back = admit([big, small], [long, job("b0", 1, owner="b", state=S.RUNNING)], cluster((5, 0)))
    assert queue(held_back) == [("a1", R.CLUSTER_FULL), ("b1", R.BEHIND_OTHERS)]
    assert names(admit([big, small], [long], cluster((5, 0))).start) == ["a1"]
    never_first = big.model_copy(update={"reason": None})
    assert names(admit([never_first, small], [long], cluster((5, 0))).start) == ["b1"]


def test_an_owners_more_urgent_job_takes_the_place_that_its_other_job_kept() -> None:
    big = job("a1", 4, owner="a", age_s=5, reason=R.CLUSTER_FULL, queue_position=1)
    urgent = job("a2", 2, owner="a", priority=1)
    assert names(line([big, urgent, job("b1", 1, owner="b")], [])) == ["a2", "b1", "a1"]


def test_a_quota_keeps_its_owner_waiting_and_nobody_else() -> None:
    quotas = {"a": Quota(max_running_workers=3), "b": Quota()}
    jobs = [job("a1", 2, owner="a", age_s=3), job("a2", 1, owner="a", age_s=2), job("b1", 4, owner="b", age_s=1)]
    admission = admit(
        jobs, [job("a0", 2, owner="a", state=S.PAUSING)], cluster((8, 0)), quota_of=lambda owner: quotas[owner]
    )
    assert names(admission.start) == ["b1"]
    assert queue(admission) == [("a1", R.OWNER_QUOTA), ("a2", R.BEHIND_OTHERS)]
    assert [w.phase for w in admission.waiting] == [P.WAITING_QUOTA, P.WAITING_QUOTA]
    assert "a may run 3 workers at once" in admission.waiting[0].detail


def test_jobs_that_start_together_count_against_the_quota_together() -> None:
    jobs = [job("a1", 2), job("a2", 2), job("a3", 1)]
    admission = admit(jobs, [], cluster((8, 0)), quota_of=lambda owner: Quota(max_running_workers=3))
    assert names(admission.start) == ["a1"]


def test_a_job_larger_than_its_owners_quota_stands_aside() -> None:
    jobs = [job("large", 4), job("small", 1)]
    admission = admit(jobs, [], cluster((8, 0)), quota_of=lambda owner: Quota(max_running_workers=3))
    assert names(admission.start) == ["small"]
    assert queue(admission) == [("large", R.OWNER_QUOTA)]
    assert "ask for a larger quota" in admission.waiting[0].detail


@pytest.mark.parametrize("state", [S.QUEUED, S.RUNNING, S.PAUSED, S.RECOVERING, S.CANCELLING])
def test_a_job_waits_for_those_before_it_and_names_them(state: JobState) -> None:
    later = job("later", after=(JOB_A, JOB_B))
    admission = admit([later, job("next")], [], cluster((4, 0)), states_before={JOB_A: S.SUCCEEDED, JOB_B: state})
    assert names(admission.start) == ["next"]
    (waiting,) = admission.waiting
    assert (waiting.phase, waiting.reason) == (P.WAITING_JOBS, R.WAITING_FOR_JOBS)
    assert waiting.detail == f"starts after {JOB_B} ({state})"


def test_a_job_starts_when_all_before_it_have_succeeded() -> None:
    states = {JOB_A: S.SUCCEEDED, JOB_B: S.SUCCEEDED}
    assert names(admit([job("x", after=(JOB_A, JOB_B))], [], cluster((4, 0)), states_before=states).start) == ["x"]


@pytest.mark.parametrize(
    ("states", "said"), [({JOB_A: S.FAILED}, "failed"), ({JOB_A: S.CANCELLED}, "cancelled"), ({}, "gone")]
)
def test_a_job_that_waits_for_one_that_ended_otherwise_waits_in_vain(states: dict[str, JobState], said: str) -> None:
    admission = admit([job("x", after=(JOB_A,))], [], cluster((4, 0)), states_before=states)
    assert [(j.id, why) for j, why in admission.in_vain] == [("x", f"it was to start after {JOB_A} ({said})")]
    assert (admission.start, admission.waiting) == ((), ())


def test_without_a_cluster_all_wait_in_line_and_are_told_why() -> None:
    admission = admit([job("a"), job("b", priority=1)], [], None, cluster_error="no answer from ray")
    assert queue(admission) == [("b", R.CLUSTER_UNREACHABLE), ("a", R.CLUSTER_UNREACHABLE)]
    assert {(w.phase, w.detail) for w in admission.waiting} == {(P.WAITING_CLUSTER, "no answer from ray")}


_jobs = st.lists(st.tuples(st.integers(1, 6), st.sampled_from("abc"), st.integers(-1, 1)), min_size=1, max_size=8)


@given(wanted=_jobs, ends=st.data())
@settings(deadline=None, max_examples=100)
def test_every_job_that_fits_the_cluster_starts_if_jobs_end_and_new_ones_keep_coming(
    wanted: list[tuple[int, str, int]], ends: st.DataObject
) -> None:
    """Rounds of: judge the queue, start, let some job end; owner z submits a small job at each round."""
    waiting = [
        job(f"j{n}", workers, owner=owner, priority=priority, age_s=100 - n)
        for n, (workers, owner, priority) in enumerate(wanted)
    ]
    running: list[Job] = []
    early = {j.id for j in waiting}
    for turn in range(200):
        if not early & {j.id for j in waiting}:
            return
        waiting.append(job(f"z{turn:03}", 1, owner="z", age_s=-turn))
        admission = admit(waiting, running, cluster((6, 0)))
        assert sum(j.spec.num_workers for j in (*running, *admission.start)) <= 6
        running += [j.model_copy(update={"state": S.RUNNING}) for j in admission.start]
        waiting = [
            w.job.model_copy(update={"reason": w.reason, "queue_position": w.position}) for w in admission.waiting
        ]
        waiting.sort(key=lambda j: (j.created_at, j.id))
        # Whichever ends: the one that has run longest at the latest after six rounds, so that all end some time.
        running.pop(0 if turn % 6 == 0 else ends.draw(st.integers(0, len(running) - 1)))
    raise AssertionError(f"never started: {early & {j.id for j in waiting}}")
