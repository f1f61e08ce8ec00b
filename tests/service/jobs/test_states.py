"""The state machine as data: closed, reachable, and final where it says so."""

from service.jobs import ACTIVE_STATES, TRANSITIONS, JobState, Reason, ReasonClass, Retries


def test_every_state_has_its_row_and_is_reachable_from_queued() -> None:
    reached, frontier = {JobState.QUEUED}, [JobState.QUEUED]
    while frontier:
        new = TRANSITIONS[frontier.pop()] - reached
        reached |= new
        frontier.extend(new)
    assert reached == set(JobState) == set(TRANSITIONS)


def test_terminal_states_are_exactly_three_and_lead_nowhere() -> None:
    assert {s for s in JobState if s.terminal} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


def test_every_state_that_is_not_terminal_can_still_end() -> None:
    ends = {s for s in JobState if s.terminal}
    for _ in JobState:
        ends |= {state for state, targets in TRANSITIONS.items() if targets & ends}
    assert ends == set(JobState)


def test_active_states_are_those_that_may_hold_resources() -> None:
    assert {JobState.QUEUED, JobState.PAUSED}.isdisjoint(ACTIVE_STATES)
    assert not any(state.terminal for state in ACTIVE_STATES)


def test_every_reason_has_a_class_and_errors_of_the_user_are_never_retried() -> None:
    assert {reason.reason_class for reason in Reason} <= set(ReasonClass)
    assert Retries().of_class(ReasonClass.USER_ERROR) == 0
    assert {ReasonClass(name) for name in Retries.model_fields} <= {reason.reason_class for reason in Reason}
