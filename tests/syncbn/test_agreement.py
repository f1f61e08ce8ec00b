"""Ranks that mean different things by one exchange: each is told so, with layers and ranks, and can go on."""

import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import ExchangeError, RanksDisagree, SyncBatchNorm, name_layers, population_statistics
from syncbn.agreement import TEXT_SIZE, Exchange, digest_of, read_text, text_of
from syncbn.exchange import gather_over_ranks, peers, sum_over_ranks
from tests.ranks import run_ranks
from tests.syncbn.told import Told, batch, told_by, two_layers

HUGE = 40_000  # channels: for two ranks beyond what is sent to all at once


def _go_on() -> float:
    """The process group still works: the number of its ranks."""
    one = torch.ones(())
    dist.all_reduce(one)
    return one.item()


def _check(told: list[Told], layer: str, ranks: tuple[int, ...], *words: str) -> None:
    for answer in told:
        assert (answer.error, answer.layer, answer.ranks) == ("RanksDisagree", layer, ranks), answer
        assert not [word for word in words if word not in answer.detail], answer.detail


def _other_channels(odd: int, num_channels: int) -> tuple[Told, float]:
    mine = num_channels if dist.get_rank() == odd else 6
    model = two_layers(num_channels=mine)
    return told_by(lambda: model(batch(mine))), _go_on()


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_channels", [5, 8, HUGE])
def test_another_number_of_channels_is_told_to_every_rank_and_the_group_goes_on(
    world_size: int, num_channels: int
) -> None:
    told, alive = zip(*run_ranks(world_size, _other_channels, 1, num_channels), strict=True)
    differing = (0, 1) if world_size == 2 else (1,)
    _check(list(told), "stem", differing, f"rank 1 is at the forward of 'stem' ({num_channels} channels, float32)")
    assert alive == (world_size,) * world_size


def _other_dtype() -> Told:
    model, dtype = two_layers(), torch.bfloat16 if dist.get_rank() == 2 else torch.float32
    return told_by(lambda: model(batch(dtype=dtype)))


def test_another_type_of_input_is_told_to_every_rank() -> None:
    told = run_ranks(3, _other_dtype)
    _check(told, "stem", (2,), "ranks 0 and 1 are at", "float32", "rank 2 is at", "bfloat16")


def _other_order() -> Told:
    model = two_layers()
    layers = reversed(list(model)) if dist.get_rank() == 0 else model
    return told_by(lambda: nn.Sequential(*layers)(batch()))


def test_another_order_of_layers_of_equal_size_is_told_to_every_rank() -> None:
    told = run_ranks(3, _other_order)
    assert [answer.layer for answer in told] == ["head", "stem", "stem"]
    for answer in told:
        assert answer.ranks == (0,)
        assert "rank 0 is at the forward of 'head'" in answer.detail
        assert "ranks 1 and 2 are at the forward of 'stem'" in answer.detail


def _backward_or_forward() -> Told:
    model = two_layers()
    output = model(batch())
    if dist.get_rank() == 1:
        return told_by(lambda: model(batch()))
    return told_by(output.sum().backward)


def test_a_skipped_backward_is_told_to_every_rank() -> None:
    backward, forward = run_ranks(2, _backward_or_forward)
    assert (backward.layer, forward.layer) == ("head", "stem")
    for answer in (backward, forward):
        assert answer.error == "RanksDisagree"
        assert "rank 0 is at the backward of 'head' (6 channels, float32)" in answer.detail
        assert "rank 1 is at the forward of 'stem' (6 channels, float32)" in answer.detail


def _other_channels_compiled() -> Told:
    warnings.simplefilter("ignore", DeprecationWarning)  # the compiler itself uses what torch says is deprecated
    mine = 6 + dist.get_rank()
    model = torch.compile(two_layers(num_channels=mine), fullgraph=True, backend="aot_eager")
    return told_by(lambda: model(batch(mine)))


def test_compiled_layers_are_told_the_same() -> None:
    told = run_ranks(2, _other_channels_compiled)
    _check(told, "stem", (0, 1), "rank 1 is at the forward of 'stem' (7 channels, float32)")


def _gradient_of_gradient_or_forward() -> Told:
    model, x = two_layers(), batch()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    if dist.get_rank() == 1:
        return told_by(lambda: model(batch()))
    return told_by(gradient.square().sum().backward)


def test_a_skipped_second_backward_is_told_to_every_rank() -> None:
    again, forward = run_ranks(2, _gradient_of_gradient_or_forward)
    assert again.ranks == forward.ranks == (0, 1)
    assert "rank 0 is at the further backward of 'stem' (6 channels, float32)" in again.detail
    assert again.detail == forward.detail
    assert "rank 1 is at the forward of 'stem' (6 channels, float32)" in again.detail


def _one_pair_disagrees() -> Told | Tensor:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = two_layers(pairs[rank // 2], num_channels=7 if rank == 3 else 6)
    if rank < 2:
        total: Tensor = model(batch()).detach()
        return total
    return told_by(lambda: model(batch(7 if rank == 3 else 6)))


def test_sub_groups_disagree_for_themselves_and_name_ranks_of_the_world() -> None:
    *fine, two, three = run_ranks(4, _one_pair_disagrees)
    assert all(isinstance(output, Tensor) for output in fine)
    assert isinstance(two, Told)
    assert isinstance(three, Told)
    _check([two, three], "stem", (2, 3), "rank 2 is at", "rank 3 is at", "7 channels")


def _other_sizes(gathered: bool) -> tuple[Told, float]:
    exchange = gather_over_ranks if gathered else sum_over_ranks
    vector = torch.zeros(4 if dist.get_rank() == 3 else 5, dtype=torch.float64)
    return told_by(partial(exchange, vector, peers(None))), _go_on()


@pytest.mark.parametrize("gathered", [False, True])
def test_more_ranks_than_are_sent_to_at_once_are_told_too(gathered: bool) -> None:
    told, alive = zip(*run_ranks(9, _other_sizes, gathered), strict=True)
    _check(list(told), "", (3,), "rank 3 is at the", "(4 values)", "ranks 0, 1, 2, 4, 5, 6, 7 and 8 are at the")
    assert alive == (9,) * 9


def _other_population() -> Told:
    model = two_layers(num_channels=6 if dist.get_rank() else 5)
    return told_by(lambda: population_statistics(model, []))


def test_population_statistics_of_other_layers_are_told_to_every_rank() -> None:
    _check(run_ranks(2, _other_population), "", (0, 1), "population statistics (26 values)", "(30 values)")


def _without_names() -> Told:
    num_channels = 6 + dist.get_rank()
    return told_by(lambda: SyncBatchNorm(num_channels)(batch(num_channels)))


def test_layers_without_a_name_are_compared_too() -> None:
    _check(run_ranks(2, _without_names), "", (0, 1), "a layer without a name (6 channels", "(7 channels")


def test_layers_that_were_built_as_such_can_be_named_and_conversion_names_them() -> None:
    layer = SyncBatchNorm(2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    assert layer.layer_name == ""
    assert name_layers(model) is model
    assert layer.layer_name == "1.0"
    assert [layer.layer_name for layer in two_layers()] == ["stem", "head"]


@pytest.mark.parametrize("path", ["stem", "", "schicht.ä.层", "x" * 300 + "é" * 100])
def test_an_exchange_has_a_text_and_a_number_that_equal_only_its_own(path: str) -> None:
    exchange = Exchange("forward", path, 6, torch.float32)
    doubles, digest = text_of(exchange), digest_of(exchange)
    assert doubles.shape == (TEXT_SIZE,)
    assert torch.isfinite(doubles).all()
    assert digest.vector.tolist() == [digest.number]
    assert digest.number.is_integer()
    again = Exchange("forward", path, 6, torch.float32)
    assert torch.equal(doubles, text_of(again))
    assert digest.number == digest_of(again).number
    text = read_text(doubles)
    if len(str(exchange).encode()) <= 8 * TEXT_SIZE:
        assert text == str(exchange)
    else:
        assert text.startswith("forward of 'xxx")
        assert text.endswith("(6 channels, float32)")
    for other in (
        Exchange("backward", path, 6, torch.float32),
        Exchange("forward", path[:200] + "y" + path[200:], 6, torch.float32),
        Exchange("forward", path, 7, torch.float32),
        Exchange("forward", path, 6, torch.float64),
    ):
        assert not torch.equal(doubles, text_of(other))
        assert digest.number != digest_of(other).number


def test_what_is_no_text_is_called_so() -> None:
    assert "no exchange of a SyncBatchNorm" in read_text(torch.zeros(TEXT_SIZE, dtype=torch.float64))


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(RanksDisagree("they differ", layer="stem", ranks=[1])))
    assert isinstance(error, ExchangeError)
    assert (str(error), error.detail, error.layer, error.ranks) == ("they differ", "they differ", "stem", (1,))
