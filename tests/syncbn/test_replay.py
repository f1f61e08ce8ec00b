"""Replayed statistics against those of models that really trained with the other momentum."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, accumulate_statistics, convert_sync_batchnorm, freeze, population_statistics
from syncbn.history import StatisticsHistory
from syncbn.replay import best_of, compare_momenta, replay, replay_all, unseen_weights
from tests.ranks import run_ranks

STEPS = 25
Buffers = dict[str, tuple[Tensor, Tensor]]


def _network(momentum: float | None) -> nn.Sequential:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16, 6)
    norms = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm1d(6, momentum=momentum)
    return nn.Sequential(conv, norms[0], nn.ReLU(), nn.Flatten(), linear, norms[1], nn.ReLU(), nn.Linear(6, 3))


def _train(
    model: nn.Module, capacity: int = STEPS, steps: int = STEPS, seed: int = 1, batch: int = 4
) -> StatisticsHistory:
    """Of a model, plain or replicated, on images of this ``seed``: weights move far, and statistics with them."""
    history = StatisticsHistory(model, capacity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        torch.autograd.backward((model(1 + torch.randn(batch, 1, 6, 6, generator=generator)) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        history.record()
    return history


def _buffers(model: nn.Module) -> Buffers:
    buffers = {}
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            buffers[path] = layer.running_mean.clone(), layer.running_var.clone()
    return buffers


def _assert_replayed(history: StatisticsHistory, momentum: float | None, expected: Buffers, tolerance: float) -> None:
    replayed = replay(history, momentum)
    assert list(replayed) == list(expected)
    for path, (mean, var) in expected.items():
        torch.testing.assert_close(replayed[path].mean, mean.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(replayed[path].unbiased_var, var.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("used", [0.1, None])
def test_a_replay_has_the_statistics_of_a_training_with_that_momentum(used: float | None) -> None:
    model = _network(used)
    history = _train(model)
    # A rounding of 6e-8 in the buffers is divided by the momentum in use, in a mean of all by one over their number.
    tolerance = 2e-7 / (used or 1 / STEPS) + 1e-6
    for momentum in (1.0, 0.003, None):
        other = _network(momentum)
        _train(other, capacity=1)
        for weight, same in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, same)  # momentum touches no weight
        _assert_replayed(history, momentum, _buffers(other), tolerance)
    _assert_replayed(history, used, _buffers(model), 1e-12)
    assert set(unseen_weights(history, [0.1, None]).values()) == {0.0}


def _replicas_history(momentum: float, capacity: int, steps: int) -> tuple[StatisticsHistory, Buffers]:
    replica = DistributedDataParallel(convert_sync_batchnorm(_network(momentum)))
    rank = torch.distributed.get_rank()
    return _train(replica, capacity, steps, seed=rank, batch=2 + rank), _buffers(replica.module)


def _ranks_replay() -> dict[float | None, dict[str, Tensor]]:
    history, _ = _replicas_history(0.1, STEPS, STEPS)
    _assert_replayed(history, 0.5, _replicas_history(0.5, 1, STEPS)[1], 1e-5)
    return {
        momentum: {path: torch.cat([moments.mean, moments.var]) for path, moments in replayed.items()}
        for momentum, replayed in replay_all(history).items()
    }


def test_ranks_replay_the_statistics_of_all_their_batches_with_the_same_bits() -> None:
    first, second = run_ranks(2, _ranks_replay)
    assert first.keys() == second.keys()
    for momentum, layers in first.items():
        assert all(torch.equal(layers[path], second[momentum][path]) for path in layers)


def test_a_history_that_forgot_the_start_weighs_only_what_it_holds() -> None:
    model = _network(0.1).double()
    history, batches = StatisticsHistory(model, capacity=10), []
    model[1].register_forward_hook(lambda layer, args, output: batches.append(args[0]))
    for _ in range(25):
        model(torch.randn(4, 1, 6, 6, dtype=torch.float64))
        history.record()
    assert history.num_steps == 10
    means = np.stack([batch.detach().numpy().mean((0, 2, 3)) for batch in batches[-10:]])
    variances = np.stack([batch.detach().numpy().var((0, 2, 3), ddof=1) for batch in batches[-10:]])
    weights = 0.4 * 0.6 ** np.arange(9, -1, -1.0)
    replayed = replay(history, 0.4)["1"]
    np.testing.assert_allclose(replayed.mean, weights @ means / weights.sum(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(replayed.unbiased_var, weights @ variances / weights.sum(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(replay(history, None)["1"].mean, means.mean(0), rtol=0, atol=1e-12)
    # The momentum in use needs no guess: where its statistics came from is in the oldest of the buffers.
    _assert_replayed(history, 0.1, _buffers(model), 1e-12)
    unseen = unseen_weights(history, [0.4, 0.1, None])
    assert unseen == pytest.approx({0.4: 0.6**10, 0.1: 0.9**10, None: 15 / 25}, rel=1e-12)


def test_a_layer_counts_the_batches_that_it_tracked_and_no_others() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"often": SyncBatchNorm(3), "sometimes": nn.BatchNorm1d(3), "never": nn.BatchNorm1d(3)})
    frozen = nn.BatchNorm1d(3)
    model["frozen"] = freeze(frozen)
    others = {path: nn.BatchNorm1d(3, momentum=0.5) for path in ("often", "sometimes")}
    history = StatisticsHistory(model, 50)
    for step in range(20):
        batches = [torch.randn(5, 3) + step for _ in range(3)]
        with accumulate_statistics(model):  # one batch, where there are three
            for batch in batches:
                model["often"](batch)
        others["often"](torch.cat(batches))
        if step % 3 == 1:
            model["sometimes"](batches[0])
            others["sometimes"](batches[0])
        history.record()
    _assert_replayed(history, 0.5, {path: _buffers(layer)[""] for path, layer in others.items()}, 1e-5)


def test_a_layer_run_twice_a_step_is_exact_with_its_own_momentum_and_near_with_others() -> None:
    torch.manual_seed(4)
    layer, other = nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=0.02)
    history = StatisticsHistory(layer, 100)
    for _ in range(100):
        for batch in torch.randn(2, 16, 8):
            layer(batch)
            other(batch)
        history.record()
    _assert_replayed(history, 0.1, _buffers(layer), 1e-12)
    _assert_replayed(history, 0.02, _buffers(other), 0.01)


def test_a_restart_forgets_what_came_before_buffers_were_written() -> None:
    model = _network(0.1)
    history = _train(model, steps=10)
    model.get_buffer("1.running_mean").fill_(7.0)
    history.restart()
    assert (history.num_steps, replay(history, 0.5)) == (0, {})
    model(torch.zeros(4, 1, 6, 6))
    history.record()
    assert history.num_steps == 1
    _assert_replayed(history, 0.1, _buffers(model), 1e-12)


def test_recording_leaves_model_and_training_as_they_are() -> None:
    recorded, plain = _network(0.1), _network(0.1)
    history = _train(recorded)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        torch.autograd.backward((plain(1 + torch.randn(4, 1, 6, 6, generator=generator)) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    compare_momenta(recorded, history, population_statistics(recorded, [torch.randn(50, 1, 6, 6)]))
    assert all(
        torch.equal(a, b) for a, b in zip(recorded.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_with_weights_that_stand_still_the_longest_memory_is_best_and_noise_is_as_predicted() -> None:
    layer = nn.BatchNorm1d(64, momentum=0.3)
    history, generator = StatisticsHistory(layer, 2000), torch.Generator().manual_seed(5)
    for _ in range(2000):
        layer(3 + 2 * torch.randn(8, 64, generator=generator))
        history.record()
    population = population_statistics(layer, [3 + 2 * torch.randn(20_000, 64, generator=generator)])
    candidates = compare_momenta(layer, history, population, [0.3, 0.03, 0.003, 0.0003])
    assert best_of(candidates).momentum == 0.003  # 0.0003 holds half of where it began: mean 0, variance 1
    for candidate, momentum in zip(candidates[:2], (0.3, 0.03), strict=True):
        noise = math.sqrt(momentum / (2 - momentum) / 8)  # of independent values, in their standard deviations
        assert candidate.rms_mean_shift == pytest.approx(noise, rel=0.3)  # 64 channels: 9 % of standard error


def test_what_cannot_be_replayed_is_refused_with_the_layer_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="a history of 0 steps"):
        StatisticsHistory(_network(0.1), 0)
    with pytest.raises(ValueError, match=r"1 has momentum=0, .* momentum above 0"):
        StatisticsHistory(_network(0.0), 10)
    with pytest.raises(ValueError, match=r"1 keeps its running statistics in torch.bfloat16, too coarse"):
        StatisticsHistory(_network(0.1).bfloat16(), 10)
    history = StatisticsHistory(_network(0.1), 10)
    for momentum in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            replay(history, momentum)
    assert replay(StatisticsHistory(nn.Linear(2, 2), 10), 0.1) == {}
