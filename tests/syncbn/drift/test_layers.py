"""Drift against closed forms and against normalized values themselves; rank disagreement on real ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import (
    BatchMoments,
    SyncBatchNorm,
    log_var_ratio,
    mean_shift,
    measure_drift,
    output_error,
    population_statistics,
    rank_disagreement,
    using_statistics,
)
from tests.ranks import run_ranks
from tests.syncbn.collectives import Collective, CollectiveLog

F64 = torch.float64


def _moments(mean: list[float], unbiased_var: list[float], count: float = 1001.0) -> BatchMoments:
    var = torch.tensor(unbiased_var, dtype=F64) * (count - 1) / count
    return BatchMoments(torch.tensor(count, dtype=F64), torch.tensor(mean, dtype=F64), var)


def _layer(mean: list[float], var: list[float], eps: float = 0.0) -> SyncBatchNorm:
    layer = SyncBatchNorm(len(mean), eps=eps, dtype=F64)
    layer.load_state_dict(layer.state_dict() | {"running_mean": torch.tensor(mean), "running_var": torch.tensor(var)})
    return layer


def test_drift_of_a_layer_is_what_the_formulas_say() -> None:
    model = nn.Sequential(_layer([3.0, 0.0], [4.0, 4.0]))
    (drift,) = measure_drift(model, {"0": _moments([1.0, 0.0], [4.0, 1.0])})
    assert drift.layer == "0"
    assert drift.num_channels == 2
    assert drift.max_mean_shift == pytest.approx(1.0, rel=1e-12)  # (3 - 1) / 2
    assert drift.max_mean_shift_channel == 0
    assert drift.rms_mean_shift == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert drift.max_abs_log_var_ratio == pytest.approx(math.log(4), rel=1e-12)
    assert drift.mean_abs_log_var_ratio == pytest.approx(math.log(2), rel=1e-12)
    # Channel 0: shift of 2 / 2 squared; channel 1: (1/2 - 1) squared.
    assert drift.output_error == pytest.approx(math.sqrt((1.0 + 0.25) / 2), rel=1e-12)


def test_statistics_of_the_population_itself_have_no_drift() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).double()
    population = population_statistics(model, [torch.randn(9, 3, dtype=F64)])
    before = measure_drift(model, population)
    assert [drift.layer for drift in before] == ["1", "3"]
    assert all(drift.rms_mean_shift > 0 for drift in before)
    with using_statistics(model, population):
        for drift in measure_drift(model, population):
            assert drift.rms_mean_shift == drift.mean_abs_log_var_ratio == drift.output_error == 0.0


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_the_output_error_is_the_mean_squared_change_of_normalized_values(eps: float) -> None:
    x = torch.rand(1000, 4, generator=torch.Generator().manual_seed(2), dtype=F64).pow(3) * torch.tensor([1, 2, 5, 9])
    mean, var = x.mean(0), x.var(0, correction=0)
    running_mean, running_var = mean + torch.tensor([0.0, 0.1, -1.0, 2.0]), var * torch.tensor([1.0, 2.0, 0.5, 0.1])
    change = (x - running_mean) / (running_var + eps).sqrt() - (x - mean) / (var + eps).sqrt()
    error = output_error(running_mean, running_var, mean, var, eps)
    torch.testing.assert_close(error, change.square().mean(0), rtol=1e-10, atol=1e-13)


def test_no_measure_changes_when_a_channel_is_rescaled() -> None:
    scale = torch.tensor([1e-2, 1.0, 1e3], dtype=F64)
    u, w, p, q = torch.rand(4, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 0.5
    for plain, scaled in (
        (mean_shift(u, p, q, 0.0), mean_shift(u * scale, p * scale, q * scale**2, 0.0)),
        (log_var_ratio(w, q, 0.0), log_var_ratio(w * scale**2, q * scale**2, 0.0)),
        (output_error(u, w, p, q, 0.0), output_error(u * scale, w * scale**2, p * scale, q * scale**2, 0.0)),
    ):
        torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=0)


def test_signs_tell_the_direction() -> None:
    one = torch.ones(1)
    assert mean_shift(2 * one, one, one, 0.0) > 0
    assert log_var_ratio(one / 2, one, 0.0) < 0


def test_float32_statistics_are_judged_in_float64() -> None:
    shift = mean_shift(torch.tensor([1.0]), torch.tensor([1.0 - 2**-24], dtype=F64), torch.ones(1), 0.0)
    assert shift.dtype == F64
    assert shift.item() == 2**-24


def test_drift_of_an_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at \['1'\]; the model has \['0'\]"):
        measure_drift(nn.Sequential(_layer([0.0], [1.0])), {"1": _moments([0.0], [1.0])})


def test_ranks_with_the_same_buffers_disagree_by_exactly_nothing() -> None:
    for disagreement, collectives in run_ranks(3, _disagreement, [_STATISTICS] * 3):
        assert disagreement == {"0": 0.0, "1": 0.0}
        assert collectives == [Collective("alltoall_base_", 2 * (2 + 1), "float64")]


_STATISTICS = ([1.0, float("nan")], [4.0, 1.0])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (([1.5, float("nan")], [4.0, 1.0]), 0.25),  # 0.5 of rank 0's deviation of 2
        (([1.0, float("nan")], [9.0, 1.0]), 0.5),  # a deviation of 3 for one of 2
        (([1.0, 0.0], [4.0, 1.0]), math.nan),
    ],
    ids=["mean", "variance", "not-a-number"],
)
def test_ranks_disagree_by_the_largest_difference_of_mean_or_deviation(
    other: tuple[list[float], list[float]], expected: float
) -> None:
    for disagreement, _ in run_ranks(3, _disagreement, [_STATISTICS, _STATISTICS, other]):
        assert disagreement["0"] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert disagreement["1"] == 0.0


def _disagreement(statistics: list[tuple[list[float], list[float]]]) -> tuple[dict[str, float], list[Collective]]:
    mean, var = statistics[dist.get_rank()]
    model = nn.Sequential(_layer(mean, var), nn.BatchNorm1d(1))
    with CollectiveLog() as log:
        disagreement = rank_disagreement(model)
    return disagreement, log.collectives


def test_a_process_alone_agrees_with_itself() -> None:
    assert rank_disagreement(nn.Sequential(_layer([0.0], [1.0]))) == {"0": 0.0}
    assert rank_disagreement(nn.Linear(2, 2)) == {}


def test_only_layers_that_track_have_drift() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    x: Tensor = torch.randn(5, 2)
    assert [drift.layer for drift in measure_drift(model, population_statistics(model, [x]))] == ["1"]
