"""The layer in `fully_shard`: training with sharded parameters is training in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from syncbn import JoinableModel, convert_sync_batchnorm, population_statistics, rank_disagreement
from tests.ranks import run_ranks

SIZES = [5, 3]
NUM_STEPS = 4


def _model() -> nn.Sequential:
    torch.manual_seed(21)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 6, bias=False), nn.BatchNorm1d(6, momentum=None), nn.ReLU()),
        nn.Linear(6, 3),
    )


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(22)
    number = sum(SIZES)
    return [
        (
            torch.randn(number, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (number,), generator=generator),
        )
        for _ in range(NUM_STEPS)
    ]


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], scale: float) -> list[float]:
    """The losses, summed and times ``scale``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).double(), labels, reduction="sum") * scale
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _shard(model: nn.Sequential, unit: str, **options: Any) -> nn.Module:
    """Shard the whole model, each block by itself as well, or each BatchNorm too; the latter in its own type."""
    kinds: dict[str, tuple[type[nn.Module], ...]] = {
        "model": (),
        "blocks": (nn.Sequential,),
        "layers": (nn.Sequential, nn.modules.batchnorm._BatchNorm),
    }
    for module in reversed(list(model.modules())):
        if isinstance(module, kinds[unit]) and module is not model:
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            fully_shard(module, **({} if is_norm else options))
    fully_shard(model, **options)
    return model


def _full(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every parameter put together again; all ranks must call."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in _state(model)}


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.state_dict().items())


@pytest.mark.parametrize(
    ("unit", "sizes"),
    [("model", (5, 3)), ("blocks", (5, 3)), ("layers", (5, 3)), ("blocks", (8,)), ("layers", (4, 0, 3, 1))],
    ids=["model", "blocks", "layers", "alone", "empty"],
)
def test_steps_with_sharded_parameters_are_steps_of_one_process(unit: str, sizes: tuple[int, ...]) -> None:
    reference = _model().double()
    losses = _train(reference, _batches(), 1 / sum(SIZES))
    results = run_ranks(len(sizes), _train_sharded, unit, list(sizes))
    for state, _, disagreement in results:
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert set(disagreement.values()) == {0.0}
    means = [sum(shares) / len(sizes) for shares in zip(*(result[1] for result in results), strict=True)]
    torch.testing.assert_close(means, losses)


def _train_sharded(unit: str, sizes: list[int]) -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    rank = dist.get_rank()
    shards = [(torch.split(x, sizes)[rank], torch.split(y, sizes)[rank]) for x, y in _batches()]
    model = _shard(convert_sync_batchnorm(_model().double()), unit)  # type: ignore[arg-type]
    losses = _train(model, shards, len(sizes) / sum(sizes))  # gradients are averaged over ranks
    return _full(model), losses, rank_disagreement(model)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.mark.parametrize("unit", ["model", "layers"])
def test_half_precision_parameters_leave_the_statistics_in_float32(unit: str) -> None:
    reference = _model().double()
    losses = _train(reference, _batches(), 1 / sum(SIZES))
    results = run_ranks(2, _train_half, unit)
    for state, _, disagreement in results:
        for name in ("0.1.running_mean", "0.1.running_var"):
            assert state[name].dtype == torch.float32
            # Three significant digits are what bfloat16 inputs, weights and outputs have.
            torch.testing.assert_close(
                state[name], reference.state_dict()[name], check_dtype=False, rtol=2e-2, atol=2e-2
            )
        assert set(disagreement.values()) == {0.0}
    means = [sum(pair) / 2 for pair in zip(*(result[1] for result in results), strict=True)]
    torch.testing.assert_close(means, losses, rtol=3e-2, atol=3e-2)


def _train_half(unit: str) -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    rank = dist.get_rank()
    shards = [(torch.split(x, SIZES)[rank].float(), torch.split(y, SIZES)[rank]) for x, y in _batches()]
    model = _shard(convert_sync_batchnorm(_model()), unit, mp_policy=HALF)  # type: ignore[arg-type]
    losses = _train(model, shards, 2 / sum(SIZES))
    with torch.no_grad():  # half weights beside float32 statistics, which torch's own layer refuses
        assert model.eval()(shards[0][0]).dtype == torch.bfloat16
    return _full(model), losses, rank_disagreement(model)


def test_sharded_models_have_population_statistics_and_answer_when_they_run_out() -> None:
    reference = _model().double()
    _train(reference, [(x[:5], y[:5]) for x, y in _batches()], 1 / sum(SIZES))
    population = population_statistics(reference, [x for x, _ in _batches()])
    for state, packed in run_ranks(2, _train_and_run_out):
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
        for path, moments in population.items():
            torch.testing.assert_close(packed[path], moments.pack(), rtol=1e-9, atol=1e-9)


def _train_and_run_out() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rank 1 has no batch to train on. Both see all batches for the population, every second each."""
    model = _shard(convert_sync_batchnorm(_model().double()), "blocks")  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    joinable = JoinableModel(model, (torch.empty(0, 2, 6, 6, dtype=torch.float64),), after_backward=optimizer.step)
    with Join([joinable]):
        for x, labels in _batches() if dist.get_rank() == 0 else []:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(joinable(x[:5]), labels[:5], reduction="sum") * (2 / sum(SIZES))
            torch.autograd.backward(loss)
            optimizer.step()
    population = population_statistics(model, [x for x, _ in _batches()[dist.get_rank() :: 2]])
    return _full(model), {path: moments.pack() for path, moments in population.items()}
