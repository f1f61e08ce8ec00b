"""Which failure of which rank counts: a table."""

import pytest
import torch.distributed as dist

from service.cluster.failures import Cause, RankFailure, cause_of, failure_of, judge, no_heartbeat
from service.jobs import Outcome, Reason
from tests.ranks import run_ranks
from tests.syncbn.told import announce, batch, impatient_group, two_layers, wait_for

RUNTIME = ["RuntimeError", "Exception"]
MISSING = ["RanksMissing", "ExchangeError", *RUNTIME]
DISAGREE = ["RanksDisagree", "ExchangeError", *RUNTIME]


def failure(rank: int, cause: Cause, error: str = "words", exception: str = "") -> RankFailure:
    return RankFailure(rank, f"rank {rank} on node{rank}, pid 4{rank}", cause, error, exception)


@pytest.mark.parametrize(
    ("types", "text", "cause"),
    [
        (RUNTIME, "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711", Cause.DISCONNECTED),
        (RUNTIME, "RuntimeError: [...] Read error [127.0.0.1]:4711: Connection reset by peer", Cause.DISCONNECTED),
        (RUNTIME, "RuntimeError: Application timeout caused pair closure", Cause.DISCONNECTED),
        (["DistBackendError", *RUNTIME], "ncclRemoteError: A call failed", Cause.DISCONNECTED),
        (RUNTIME, "RuntimeError: Timed out waiting 5000ms for recv operation to complete", Cause.TIMED_OUT),
        (["DistStoreError", *RUNTIME], "Timed out after 11 seconds waiting for clients. 1/2", Cause.TIMED_OUT),
        (["DistBackendError", *RUNTIME], "Watchdog caught collective operation timeout", Cause.TIMED_OUT),
        (["ValueError", "Exception"], "ValueError: Connection closed by peer is not a number", Cause.RAISED),
        (RUNTIME, "RuntimeError: mat1 and mat2 shapes cannot be multiplied", Cause.RAISED),
        (["OutOfMemoryError", *RUNTIME], "CUDA out of memory", Cause.RAISED),
        (["OSError", "Exception"], "OSError: [Errno 32] Broken pipe", Cause.RAISED),
        (MISSING, "rank 1 did not come within 30.0 s to the forward of 'bn1' [Timed out waiting]", Cause.TIMED_OUT),
        (MISSING, "rank 1 did not come in time to the forward of 'bn1'", Cause.TIMED_OUT),
        (MISSING, "the connection was lost in the forward of 'bn1' [Connection closed by peer]", Cause.DISCONNECTED),
        (DISAGREE, "rank 1 is at the forward of 'timed out after'", Cause.RAISED),
    ],
)  # fmt: skip
def test_the_words_of_an_exception_tell_what_ended_the_rank(types: list[str], text: str, cause: Cause) -> None:
    assert cause_of(types, text) is cause


@pytest.mark.parametrize(
    ("failures", "reason", "named"),
    [
        ([failure(1, Cause.LOST)], Reason.WORKER_LOST, "rank 1 on node1, pid 41"),
        ([failure(0, Cause.DISCONNECTED), failure(1, Cause.LOST)], Reason.WORKER_LOST, "rank 1"),
        ([failure(0, Cause.TIMED_OUT), failure(1, Cause.RAISED)], Reason.TRAINING_ERROR, "rank 1"),
        ([failure(2, Cause.RAISED), failure(1, Cause.LOST)], Reason.TRAINING_ERROR, "rank 2"),
        ([failure(0, Cause.DISCONNECTED), failure(1, Cause.TIMED_OUT)], Reason.COLLECTIVE_TIMEOUT, "rank 1"),
        ([failure(0, Cause.DISCONNECTED)], Reason.WORKER_LOST, "rank 0"),
        ([failure(0, Cause.RAISED, exception="UnusableCheckpoint")], Reason.CHECKPOINT_UNUSABLE, "rank 0"),
        ([failure(0, Cause.RAISED, exception="CheckpointFailed")], Reason.CHECKPOINT_FAILED, "rank 0"),
    ],
)
def test_the_first_root_cause_counts(failures: list[RankFailure], reason: Reason, named: str) -> None:
    ended = judge(failures)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, reason)
    assert ended.detail.startswith(named)


def _rank_1_stays_away() -> RankFailure | None:
    model = two_layers(impatient_group(1.0))
    if dist.get_rank() == 1:
        wait_for("told")
        return None
    try:
        model(batch())
    except RuntimeError as error:
        return failure_of(error, 0, "rank 0 on node0, pid 40")
    finally:
        announce("told")
    raise AssertionError("nobody was missed")


def test_a_collective_timeout_names_the_layer_and_the_rank_that_was_missed() -> None:
    waited, _ = run_ranks(2, _rank_1_stays_away)
    assert waited is not None
    assert waited.cause is Cause.TIMED_OUT
    ended = judge([waited], silent=["rank 1 on node1, pid 41"])
    assert ended.reason is Reason.COLLECTIVE_TIMEOUT
    assert ended.detail.startswith("rank 0 on node0, pid 40 waited in vain")
    assert "rank 1 on node1, pid 41 had stopped answering" in ended.detail
    assert "rank 1 did not come within" in ended.detail
    assert "to the forward of 'stem'" in ended.detail


def test_ranks_that_disagree_end_the_attempt_by_their_own_fault() -> None:
    error = "RanksDisagree: rank 0 is at the forward of 'a', rank 1 is at the forward of 'b'"
    ended = judge([failure(0, Cause.RAISED, error, exception="RanksDisagree")])
    assert ended.reason is Reason.TRAINING_ERROR
    assert "rank 1 is at the forward of 'b'" in ended.detail


def test_a_collective_timeout_blames_the_silent_rank() -> None:
    ended = judge([failure(0, Cause.TIMED_OUT, "Timed out waiting")], silent=["rank 1 on node1, pid 41"])
    assert ended.reason is Reason.COLLECTIVE_TIMEOUT
    assert "rank 1 on node1, pid 41 had stopped answering" in ended.detail


def test_whoever_knows_which_rank_was_missed_is_heard() -> None:
    """The missed one may be the first to give up: it waited in a collective of its own, which knows no names."""
    alone = failure(0, Cause.TIMED_OUT, "Timed out waiting 4000ms for recv")
    cut_off = failure(2, Cause.DISCONNECTED, "RanksMissing: in 'norm1' rank 0 left no word", "RanksMissing")
    in_vain = failure(3, Cause.TIMED_OUT, "RanksMissing: rank 0 did not come to 'norm1'", "RanksMissing")
    both = judge([alone, failure(1, Cause.DISCONNECTED, "Connection closed by peer"), cut_off])
    assert both.reason is Reason.COLLECTIVE_TIMEOUT
    assert both.detail.startswith("rank 0 on node0, pid 40 waited in vain")
    assert both.detail.endswith("Timed out waiting 4000ms for recv; rank 2 on node2, pid 42: " + cut_off.error)
    named = judge([alone, cut_off, in_vain]).detail
    assert named.startswith("rank 3 on node3, pid 43 waited in vain")
    assert named.endswith(in_vain.error)


def test_a_missing_heartbeat_names_the_rank_and_the_knob() -> None:
    ended = no_heartbeat(["rank 3 on node3, pid 43"], 61.2)
    assert ended.reason is Reason.NO_HEARTBEAT
    assert "rank 3 on node3, pid 43" in ended.detail
    assert "timeouts.heartbeat_s" in ended.detail
