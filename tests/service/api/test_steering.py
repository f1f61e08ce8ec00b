"""What each verb means in each state, as a table."""

from datetime import UTC, datetime

import pytest

from service.api.steering import DONE, MOVES, WAYS_OUT, Verb, target
from service.errors import Conflict
from service.jobs import TRANSITIONS, Job, JobState
from tests.service.store.telling import spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("verb", Verb)
def test_every_verb_means_exactly_one_thing_in_every_state(verb: Verb) -> None:
    meanings = [*MOVES[verb], *DONE[verb], *WAYS_OUT[verb]]
    assert sorted(meanings) == sorted(JobState)
    for before, after in MOVES[verb].items():
        assert after is before or after in TRANSITIONS[before]
    # What a verb has brought about, it finds done.
    assert verb in (Verb.CHECKPOINT, Verb.RETRY) or set(MOVES[verb].values()) <= DONE[verb]


def test_a_refusal_names_the_state_and_the_way_out() -> None:
    job = Job(
        id="job_1",
        spec=spec(),
        state=JobState.FAILED,
        state_since=NOW,
        version=3,
        created_at=NOW,
        updated_at=NOW,
    )
    with pytest.raises(Conflict, match=r"job_1 is already failed and cannot resume: .*:retry takes it up again"):
        target(Verb.RESUME, job)
    with pytest.raises(Conflict, match=r"job_1 is recovering and cannot pause: .*:cancel it"):
        target(Verb.PAUSE, job.model_copy(update={"state": JobState.RECOVERING}))
