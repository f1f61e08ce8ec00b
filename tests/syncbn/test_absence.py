"""Ranks that do not come to an exchange: every rank that waits is told in time who is missing, and where."""

import os
import signal
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, yet not marked as exported

from syncbn.absence import ACCOUNTS_S
from tests.ranks import run_ranks
from tests.syncbn.told import Told, announce, batch, get, impatient_group, put, told_by, two_layers, wait_for

PATIENCE_S = 3.0
"""Of the process groups in which a rank is waited for."""

BUSY_S = 5.0
"""What a loaded machine may add to a wait."""


def _check(told: list[Told], layer: str, missing: tuple[int, ...], *words: str) -> None:
    for answer in told:
        assert (answer.error, answer.layer, answer.ranks) == ("RanksMissing", layer, missing), answer
        assert not [word for word in words if word not in answer.detail], answer.detail
        assert answer.elapsed_s <= PATIENCE_S + ACCOUNTS_S + BUSY_S


def _told(rank: int) -> str:
    return f"told {rank}"


def _rank_1_evaluates() -> Told | None:
    model = two_layers(impatient_group(PATIENCE_S))
    if dist.get_rank() == 1:
        model.eval()(batch())
        wait_for(_told(0), _told(2))
        return None
    told = told_by(lambda: model(batch()))
    announce(_told(dist.get_rank()))
    return told


def test_a_rank_in_evaluation_mode_is_named_to_all_that_wait() -> None:
    first, nothing, last = run_ranks(3, _rank_1_evaluates)
    assert nothing is None
    assert first is not None
    assert last is not None
    _check(
        [first, last],
        "stem",
        (1,),
        f"rank 1 did not come within {PATIENCE_S:.0f}",
        "to the forward of 'stem' (6 channels, float32)",
        "ranks 0 and 2 are at the forward of 'stem'",
        "evaluates",
        "init_process_group",
    )


def _rank_1_skips_the_backward() -> Told | None:
    output = two_layers(impatient_group(PATIENCE_S))(batch())
    if dist.get_rank() == 1:
        wait_for(_told(0))
        return None
    told = told_by(output.sum().backward)
    announce(_told(0))
    return told


def test_a_rank_that_skips_its_backward_is_named() -> None:
    told, _ = run_ranks(2, _rank_1_skips_the_backward)
    assert told is not None
    _check([told], "head", (1,), "rank 1 did not come within", "to the backward of 'head'")


def _rank_1_dies() -> Told:
    model = two_layers(impatient_group(PATIENCE_S))
    output = model(batch())
    if dist.get_rank() == 1:
        os._exit(7)
    return told_by(output.sum().backward)


def test_a_rank_that_died_is_named_to_all_that_wait() -> None:
    told = run_ranks(4, _rank_1_dies, dying=[1])
    assert [answer.rank for answer in told] == [0, 2, 3]
    _check(told, "head", (1,), "the backward of 'head'", "rank 1 left no word", "ranks 0, 2 and 3 are at the backward")


def _rank_1_freezes() -> Told:
    model = two_layers(impatient_group(PATIENCE_S))
    if dist.get_rank() == 1:
        put("pid", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return told_by(lambda: model(batch()))
    told = told_by(lambda: model(batch()))
    os.kill(int(get("pid")), signal.SIGCONT)
    return told


def test_a_frozen_rank_is_named_and_is_told_itself_when_it_wakes() -> None:
    waiting, frozen = run_ranks(2, _rank_1_freezes)
    _check([waiting], "stem", (1,), "rank 1 did not come within", "to the forward of 'stem'")
    _check([frozen], "stem", (1,), "rank 1 did not come in time to the forward of 'stem'", "rank 0 waited 3.")


def _rank_1_is_elsewhere() -> Told:
    model = two_layers(impatient_group(PATIENCE_S))
    if dist.get_rank() == 1:
        wait_for(_told(0))
        return told_by(lambda: model[1](batch()))
    told = told_by(lambda: model(batch()))
    announce(_told(0))
    return told


def test_a_rank_that_comes_too_late_learns_where_it_was_waited_for() -> None:
    _, late = run_ranks(2, _rank_1_is_elsewhere)
    _check(
        [late],
        "head",
        (1,),
        "rank 1 did not come in time to the forward of 'stem'",
        "rank 1 is at the forward of 'head'",
    )
    assert late.elapsed_s < BUSY_S


def _last_rank_of_a_pair_stays_away() -> Told | bool:
    rank = dist.get_rank()
    pairs = [dist.new_group(pair, timeout=timedelta(seconds=PATIENCE_S)) for pair in ([0, 1], [2, 3])]
    model = two_layers(pairs[rank // 2])
    if rank == 3:
        wait_for(_told(2))
    if rank == 2:
        told = told_by(lambda: model(batch()))
        announce(_told(2))
        return told
    return rank == 3 or bool(model(batch()).isfinite().all())


def test_in_a_sub_group_only_its_ranks_are_told_and_by_their_numbers_in_the_world() -> None:
    first, second, told, _ = run_ranks(4, _last_rank_of_a_pair_stays_away)
    assert first
    assert second
    assert isinstance(told, Told)
    _check([told], "stem", (3,), "rank 3 did not come within", "rank 2 is at the forward of 'stem'")


def _host_of_the_store_freezes() -> Told | None:
    rank, patience = dist.get_rank(), timedelta(seconds=PATIENCE_S)
    if rank == 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        put("port", str(store.port))
        put("pid", str(os.getpid()))
    else:
        store = TCPStore("127.0.0.1", int(get("port")), is_master=False, timeout=patience)
    pid = int(get("pid"))
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    model = two_layers()
    model(batch())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    told = told_by(lambda: model(batch()))
    os.kill(pid, signal.SIGCONT)
    return told


def test_a_frozen_host_of_the_store_does_not_keep_the_others_from_being_told() -> None:
    told, _ = run_ranks(2, _host_of_the_store_freezes)
    assert told is not None
    _check([told], "stem", (1,), "rank 1 did not come within", "store does not answer")
