"""Population statistics: pooled exactly over batches and ranks, and the model is afterwards as it was before."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import BatchMoments, SyncBatchNorm, convert_sync_batchnorm, population_statistics, using_statistics
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
