"""Asking all ranks once whether they hold the same layers."""

import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, check_agreement
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog
from tests.syncbn.told import Told, told_by, two_layers


def _check(told: list[Told], ranks: tuple[int, ...], *words: str) -> None:
    for answer in told:
        assert (answer.error, answer.ranks) == ("RanksDisagree", ranks), answer
        assert not [word for word in words if word not in answer.detail], answer.detail


def _equal_models() -> int:
    with CollectiveLog() as log:
        check_agreement(two_layers())
        check_agreement(nn.Linear(2, 2))
    return len(log.collectives)


def test_equal_models_agree_after_two_exchanges_and_models_without_layers_after_one() -> None:
    assert run_ranks(2, _equal_models) == [3, 3]


def _one_in_evaluation() -> Told:
    model = two_layers()
    model[1].train(dist.get_rank() != 2)
    return told_by(lambda: check_agreement(model))


def test_a_layer_in_another_mode_is_named() -> None:
    words = "ranks 0 and 1 are at the training mode of 'head'", "rank 2 is at the evaluation mode of 'head'"
    told = run_ranks(3, _one_in_evaluation)
    _check(told, (2,), *words)
    assert [answer.layer for answer in told] == ["head"] * 3


def _one_layer_more() -> Told:
    model = two_layers()
    if dist.get_rank() == 0:
        model.append(SyncBatchNorm(3, dtype=torch.float64))
    return told_by(lambda: check_agreement(model))


def test_a_layer_that_only_one_rank_has_is_named() -> None:
    words = "rank 0 is at the training mode of '2' (3 channels, float64)", "rank 1 is at the end of its layers"
    _check(run_ranks(2, _one_layer_more), (0, 1), *words)


def test_a_process_alone_agrees_with_itself() -> None:
    check_agreement(two_layers())
