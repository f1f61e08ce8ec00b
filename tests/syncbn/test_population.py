"""Population statistics: pooled exactly over batches and ranks, and the model is afterwards as it was before."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import (
    BatchMoments,
    Estimator,
    RanksDisagree,
    SyncBatchNorm,
    apply_statistics,
    convert_sync_batchnorm,
    population_statistics,
    using_statistics,
)
from tests.ranks import run_ranks
from tests.syncbn.collectives import Collective, CollectiveLog

SIZES = (4, 7, 2)


class Backwards(nn.Module):
    """Runs its layers in another order than it names them; one never runs and one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.last = nn.BatchNorm1d(5)
        self.first = SyncBatchNorm(3)
        self.idle = nn.BatchNorm1d(4)
        self.untracked = nn.BatchNorm1d(5, track_running_stats=False)
        self.linear = nn.Linear(3, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.untracked(self.linear(self.dropout(self.first(input))))
        output: Tensor = self.last(self.last(hidden) * 3 + 1)
        return output


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator) * size + 1 for size in SIZES]


def _normalized(x: Tensor) -> Tensor:
    """By the batch's own statistics, weight 1, bias 0 and torch's eps."""
    var, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) / torch.sqrt(var + 1e-5)


def _reckoned() -> dict[str, Tensor]:
    """Everything that is fed to each layer of `Backwards`, in float64."""
    model = Backwards().double()
    first, last = [], []
    for batch in _batches():
        first.append(batch.double())
        hidden = _normalized(model.linear(_normalized(first[-1]))).detach()
        last += [hidden, _normalized(hidden) * 3 + 1]
    return {"first": torch.cat(first), "last": torch.cat(last)}


def _assert_pooled(population: dict[str, BatchMoments], tolerance: float) -> None:
    assert list(population) == ["first", "last"]
    for path, values in _reckoned().items():
        var, mean = torch.var_mean(values, 0, correction=0)
        assert population[path].count == len(values)
        torch.testing.assert_close(population[path].mean, mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(population[path].var, var, rtol=tolerance, atol=tolerance)


def test_statistics_are_pooled_over_all_values_in_execution_order() -> None:
    _assert_pooled(population_statistics(Backwards(), _batches()), 1e-5)
    double = [batch.double() for batch in _batches()]
    _assert_pooled(population_statistics(Backwards().double(), double), 1e-10)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_pool_their_batches_by_one_exchange_and_without_batches_join_it(world_size: int) -> None:
    results = run_ranks(world_size, _population_of_rank)
    for population, collectives in results:
        _assert_pooled(population, 1e-5)
        assert collectives == [Collective("alltoall_base_", 3 * 3 + 2 * (3 + 5 + 4), "float64")]
        for path, moments in population.items():
            assert torch.equal(moments.pack(), results[0][0][path].pack())


def _population_of_rank() -> tuple[dict[str, BatchMoments], list[Collective]]:
    """The last rank has no batches; the model is wrapped, and wrapping communicates in evaluation too."""
    model = DistributedDataParallel(convert_sync_batchnorm(Backwards()))
    num_ranks = dist.get_world_size() - 1
    batches = _batches()[dist.get_rank() :: num_ranks] if dist.get_rank() < num_ranks else []
    with CollectiveLog() as log:
        population = population_statistics(model, batches)
    return population, log.collectives


def test_the_model_is_left_as_it_was() -> None:
    model = Backwards()
    model(_batches()[0])
    model.first.eval()
    _assert_untouched(model, lambda: population_statistics(model, _batches()))


def test_the_model_is_left_as_it_was_when_a_batch_fails() -> None:
    model = Backwards()

    def fail() -> None:
        with pytest.raises(RuntimeError, match="no such file"):
            population_statistics(model, _broken_batches())

    _assert_untouched(model, fail)


def _broken_batches() -> Iterator[Tensor]:
    yield _batches()[0]
    raise RuntimeError("no such file")


def _assert_untouched(model: nn.Module, action: object) -> None:
    assert callable(action)
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    action()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    for name, buffer in after.items():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name])


def test_a_model_without_batchnorm_or_without_batches_has_no_statistics() -> None:
    assert population_statistics(nn.Linear(3, 3), _batches()) == {}
    assert population_statistics(Backwards(), []) == {}


def test_inside_the_block_evaluation_uses_the_statistics_with_unbiased_variance() -> None:
    model = Backwards().double()
    population = population_statistics(model, [batch.double() for batch in _batches()])
    model.eval()
    x = _batches()[1].double()
    with using_statistics(model, population):
        normalized = model.first(x)
    values = _reckoned()["first"]
    expected = (x - values.mean(0)) / (values.var(0) + model.first.eps).sqrt()
    torch.testing.assert_close(normalized, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_inside_the_block_does_not_reach_the_live_buffers(momentum: float | None) -> None:
    model = Backwards()
    model.first.momentum = momentum
    population = population_statistics(model, _batches())

    def train() -> None:
        with using_statistics(model, population):
            model(_batches()[0])

    _assert_untouched(model, train)


def test_statistics_of_an_unknown_layer_are_refused_and_nothing_is_changed() -> None:
    model = Backwards()
    live = dict(model.named_buffers())
    block = using_statistics(model, {"frist": BatchMoments.empty(3)})
    with pytest.raises(ValueError, match=r"\['frist'\]; the model has \['first', 'idle', 'last'\]"), block:
        pass
    assert all(buffer is live[name] for name, buffer in model.named_buffers())


BATCH_SIZES = (4, 9, 2, 5)
NUM_CHANNELS = 3


def _images() -> list[Tensor]:
    """Batches whose sizes, means and spreads differ."""
    generator = torch.Generator().manual_seed(6)
    return [
        torch.randn(size, NUM_CHANNELS, 2, 3, generator=generator) * size + step
        for step, size in enumerate(BATCH_SIZES)
    ]


def _reckon(estimator: Estimator, images: list[Tensor], momentum: float | None) -> tuple[Any, Any]:
    """Mean and variance for evaluation, in numpy."""
    values = [x.double().transpose(0, 1).reshape(NUM_CHANNELS, -1).numpy() for x in images]
    if estimator is Estimator.POOLED:
        joined = np.concatenate(values, axis=1)
        return joined.mean(1), joined.var(1, ddof=1)
    keep = 1 - momentum if estimator is Estimator.MOVING_AVERAGE and momentum is not None else 1.0
    weights = keep ** np.arange(len(values))[::-1]
    means = np.array([batch.mean(1) for batch in values])
    variances = np.array([batch.var(1, ddof=1) for batch in values])
    return np.average(means, axis=0, weights=weights), np.average(variances, axis=0, weights=weights)


ESTIMATORS = pytest.mark.parametrize(
    ("estimator", "momentum"),
    [
        (Estimator.POOLED, 0.1),
        (Estimator.MEAN_OF_BATCHES, 0.1),
        (Estimator.MOVING_AVERAGE, 0.3),
        (Estimator.MOVING_AVERAGE, 1.0),
        (Estimator.MOVING_AVERAGE, None),
    ],
    ids=lambda value: str(value),
)


@ESTIMATORS
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm])
def test_every_estimator_is_what_numpy_reckons(
    estimator: Estimator, momentum: float | None, kind: type[nn.BatchNorm2d]
) -> None:
    model = nn.Sequential(kind(NUM_CHANNELS, momentum=momentum))
    population = population_statistics(model, _images(), estimator=estimator)["0"]
    mean, var = _reckon(estimator, _images(), momentum)
    assert population.count == sum(BATCH_SIZES) * 6
    np.testing.assert_allclose(population.mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(population.unbiased_var.numpy(), var, rtol=1e-6)


@ESTIMATORS
def test_ranks_estimate_together_what_numpy_reckons_from_all(estimator: Estimator, momentum: float | None) -> None:
    results = run_ranks(3, _estimate_of_rank, estimator, momentum)
    shares = [_reckon(estimator, _images()[rank::2], momentum) for rank in range(2)]
    if estimator is Estimator.POOLED:
        mean, var = _reckon(estimator, _images(), momentum)
    else:  # two batches each: the ranks' weights have equal sums
        mean, var = (sum(share) / 2 for share in zip(*shares, strict=True))
    for vector, num_collectives in results:
        population = BatchMoments.unpack(vector)
        assert num_collectives == 1
        np.testing.assert_allclose(population.mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(population.unbiased_var.numpy(), var, rtol=1e-6)
        assert torch.equal(vector, results[0][0])


def _estimate_of_rank(estimator: Estimator, momentum: float | None) -> tuple[Tensor, int]:
    """Ranks 0 and 1 share the batches; rank 2 has none."""
    model = nn.Sequential(SyncBatchNorm(NUM_CHANNELS, momentum=momentum))
    rank = dist.get_rank()
    with CollectiveLog() as log:
        population = population_statistics(model, _images()[rank::2] if rank < 2 else [], estimator=estimator)
    return population["0"].pack(), len(log.collectives)


def test_ranks_that_want_different_estimates_are_told_so() -> None:
    for message in run_ranks(2, _estimate_differently):
        assert "rank 0 is at the mean_of_batches population statistics" in message
        assert "rank 1 is at the moving_average population statistics" in message


def _estimate_differently() -> str:
    estimator = (Estimator.MEAN_OF_BATCHES, Estimator.MOVING_AVERAGE)[dist.get_rank()]
    with pytest.raises(RanksDisagree) as error:
        population_statistics(SyncBatchNorm(NUM_CHANNELS), _images(), estimator=estimator)
    return str(error.value)


def test_the_moving_average_is_what_training_tracks_less_its_starting_value() -> None:
    layer = SyncBatchNorm(NUM_CHANNELS, momentum=0.3)
    replayed = population_statistics(layer, _images(), estimator=Estimator.MOVING_AVERAGE)[""]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_var.zero_()
    for x in _images():
        layer(x)
    tracked = 1 - 0.7 ** len(BATCH_SIZES)
    torch.testing.assert_close(replayed.mean.float(), layer.running_mean / tracked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(replayed.unbiased_var.float(), layer.running_var / tracked, rtol=1e-5, atol=1e-5)


def test_a_moving_average_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=0 has no moving average"):
        population_statistics(SyncBatchNorm(3, momentum=0.0), _batches(), estimator=Estimator.MOVING_AVERAGE)


def test_of_equal_batches_with_equal_means_all_estimators_agree_up_to_the_correction() -> None:
    half = torch.randn(4, 3, dtype=torch.float64)
    batches = [half, half.flip(0)]
    layer = SyncBatchNorm(3, dtype=torch.float64)
    variances = [population_statistics(layer, batches, estimator=one)[""].unbiased_var for one in Estimator]
    torch.testing.assert_close(variances[0] * (7 / 8), variances[1] * (3 / 4), rtol=1e-12, atol=0)
    torch.testing.assert_close(variances[1], variances[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", Estimator)
def test_nothing_of_a_batch_is_kept(estimator: Estimator) -> None:
    batches: list[weakref.ref[Tensor]] = []
    fed: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))
    model[1].register_forward_pre_hook(lambda _, inputs: fed.append(weakref.ref(inputs[0])))

    def watched() -> Iterator[Tensor]:
        for _ in range(10):
            batch = torch.randn(2, 3)
            batches.append(weakref.ref(batch))
            yield batch
            # The loop outside still names the last batch.
            assert [ref() for ref in batches[:-1]] == [None] * (len(batches) - 1)
            assert [ref() for ref in fed] == [None] * len(batches)

    population = population_statistics(model, watched(), estimator=estimator)
    assert len(fed) == 10
    assert population["1"].pack().numel() == 2 * 3 + 1


def test_samples_with_targets_are_taken_apart_by_default_or_as_told() -> None:
    plain = population_statistics(Backwards(), _batches())
    pairs = [(x, torch.zeros(len(x))) for x in _batches()]
    records = [{"image": x} for x in _batches()]
    for other in (
        population_statistics(Backwards(), pairs),
        population_statistics(Backwards(), [list(pair) for pair in pairs]),
        population_statistics(Backwards(), records, input_of=lambda record: record["image"]),
    ):
        assert all(torch.equal(other[path].pack(), plain[path].pack()) for path in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_layer", [False, True], ids=["float32-layer", "half-layer"])
def test_half_inputs_are_pooled_in_full(dtype: torch.dtype, half_layer: bool) -> None:
    images = [x.to(dtype) for x in _images()]
    layer = SyncBatchNorm(NUM_CHANNELS, dtype=dtype if half_layer else None)
    population = population_statistics(layer, images)[""]
    mean, var = _reckon(Estimator.POOLED, images, 0.1)
    np.testing.assert_allclose(population.mean.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(population.unbiased_var.numpy(), var, rtol=1e-5)


def test_applied_statistics_are_written_in_place_and_nothing_else_is() -> None:
    model = Backwards()
    model(_batches()[0])
    population = population_statistics(model, _batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    apply_statistics(model, population)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    for path in ("first", "last"):
        torch.testing.assert_close(buffers[f"{path}.running_mean"], population[path].mean.float(), rtol=0, atol=0)
        torch.testing.assert_close(
            buffers[f"{path}.running_var"], population[path].unbiased_var.float(), rtol=0, atol=0
        )
        del before[f"{path}.running_mean"], before[f"{path}.running_var"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_applying_to_an_unknown_layer_is_refused_before_anything_is_written() -> None:
    model = Backwards()
    population = {"first": BatchMoments.empty(3), "frist": BatchMoments.empty(3)}
    with pytest.raises(ValueError, match=r"\['frist'\]; the model has \['first', 'idle', 'last'\]"):
        apply_statistics(model, population)
    narrow = {"first": BatchMoments.unpack(torch.tensor([2.0] * 7)), "last": BatchMoments.empty(1)}
    with pytest.raises(ValueError, match="last has 5 channels, and its statistics 1"):
        apply_statistics(model, narrow)
    assert torch.equal(model.state_dict()["first.running_var"], torch.ones(3))


class Padded(nn.Module):
    """Tells its layer where the padding is, by position or by keyword."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(NUM_CHANNELS)
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        valid = x.isfinite().all(1)
        output: Tensor = self.norm(x, mask=valid) if self.by_keyword else self.norm(x, valid)
        return output


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("estimator", Estimator)
def test_what_is_masked_does_not_count(by_keyword: bool, estimator: Estimator) -> None:
    images = [x.flatten(2) for x in _images()]
    padded = [nn.functional.pad(x, (0, 2), value=torch.nan) for x in images]
    population = population_statistics(Padded(by_keyword), padded, estimator=estimator)["norm"]
    mean, var = _reckon(estimator, images, 0.1)
    assert population.count == sum(BATCH_SIZES) * 6
    np.testing.assert_allclose(population.mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(population.unbiased_var.numpy(), var, rtol=1e-6)


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, SyncBatchNorm])
def test_batches_without_samples_change_nothing(estimator: Estimator, kind: type[nn.BatchNorm2d]) -> None:
    empty = torch.empty(0, NUM_CHANNELS, 2, 3)
    batches = [empty, *_images()[:2], empty, *_images()[2:], empty]
    population = population_statistics(kind(NUM_CHANNELS), batches, estimator=estimator)[""]
    mean, var = _reckon(estimator, _images(), 0.1)
    np.testing.assert_allclose(population.mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(population.unbiased_var.numpy(), var, rtol=1e-6)
