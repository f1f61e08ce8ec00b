"""Replay: what the running statistics would be now, had training tracked them with another momentum.

Training normalizes by the batch's own statistics, so that the momentum of the running ones changes no weight and no
batch: one run holds the running statistics of every momentum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from syncbn.drift import measure_drift
from syncbn.history import LayerTrack, StatisticsHistory
from syncbn.moments import BatchMoments
from syncbn.population import using_statistics

MOMENTA = (0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""A grid that reaches from the last two batches to the last thousand; neighbours are a factor of three apart."""


@dataclass(frozen=True)
class MomentumDrift:
    """Drift from the population's statistics with one momentum, of the layer that is worst in each number.

    ``rms_mean_shift`` and ``output_error`` are those of `syncbn.drift.LayerDrift`. ``unseen_weight`` is how much of
    the statistics is older than the history (in the layer with most): of that the history tells nothing.
    """

    momentum: float | None
    rms_mean_shift: float
    output_error: float
    unseen_weight: float


def replay(history: StatisticsHistory, momentum: float | None) -> dict[str, BatchMoments]:
    """The running statistics with ``momentum`` in every layer, by path; None for the mean over all batches.

    Each layer starts as it did in training where the history reaches back to its first batch, or where ``momentum``
    is the one in use; else its start is unknown, and the weights of the batches are divided by their sum. A layer
    that has tracked no batch is left out. ``unbiased_var`` is the running variance; ``count`` is that of batches.

    Cost: ``O(T * C)`` for ``T`` steps. No collective; where the ranks are synchronized they all get the same.

    Raises:
        ValueError: if ``momentum`` is not in ``(0, 1]``.
    """
    return replay_all(history, [momentum])[momentum]


@torch.no_grad()
def replay_all(
    history: StatisticsHistory, momenta: Iterable[float | None] = MOMENTA
) -> dict[float | None, dict[str, BatchMoments]]:
    """`replay` with each of ``momenta``: one recovery of the batches, and one product of matrices a layer.

    Raises:
        ValueError: if one of ``momenta`` is not in ``(0, 1]``.
    """
    chosen = _checked(momenta)
    tracks = {path: track for path, track in history.tracks().items() if bool(track.num_batches.any())}
    replayed = {path: _replay_layer(track, chosen) for path, track in tracks.items()}
    return {momentum: {path: moments[i] for path, moments in replayed.items()} for i, momentum in enumerate(chosen)}


def compare_momenta(
    model: nn.Module,
    history: StatisticsHistory,
    population: Mapping[str, BatchMoments],
    momenta: Iterable[float | None] = MOMENTA,
) -> list[MomentumDrift]:
    """How far from ``population`` the running statistics of each momentum are, in the order of ``momenta``.

    ``population`` belongs to the weights as they are now (`population_statistics`), and is itself a sample: its own
    error stands in all the numbers alike. ``model`` is left as it is. Empty where no layer has both. No collective.

    Raises:
        ValueError: if one of ``momenta`` is not in ``(0, 1]``.
    """
    unseen = unseen_weights(history, momenta := _checked(momenta))
    drifts = []
    for momentum, replayed in replay_all(history, momenta).items():
        with using_statistics(model, replayed):
            layers = measure_drift(model, {path: population[path] for path in population if path in replayed})
        if layers:
            drifts.append(
                MomentumDrift(
                    momentum=momentum,
                    rms_mean_shift=max(layer.rms_mean_shift for layer in layers),
                    output_error=max(layer.output_error for layer in layers),
                    unseen_weight=unseen[momentum],
                )
            )
    return drifts


def best_of(candidates: Iterable[MomentumDrift]) -> MomentumDrift:
    """The candidate whose worst layer has the least output error."""
    return min(candidates, key=lambda candidate: candidate.output_error)


def unseen_weights(history: StatisticsHistory, momenta: Iterable[float | None]) -> dict[float | None, float]:
    """By momentum, how much of the running statistics is older than the history; 0 where it reaches the first batch."""
    chosen = _checked(momenta)
    unseen = torch.zeros(len(chosen), dtype=torch.float64)
    for track in history.tracks().values():
        if track.num_batches_before > 0:
            remaining = [_remaining(track, momentum, track.num_batches_before).prod() for momentum in chosen]
            unseen = torch.maximum(unseen, torch.stack(remaining).cpu())
    return dict(zip(chosen, unseen.tolist(), strict=True))


def _checked(momenta: Iterable[float | None]) -> list[float | None]:
    chosen = list(dict.fromkeys(momenta))
    wrong = [momentum for momentum in chosen if momentum is not None and not 0 < momentum <= 1]
    if wrong:
        raise ValueError(f"a momentum is above 0 and at most 1, or None for the mean over all batches; got {wrong}")
    return chosen


def _replay_layer(track: LayerTrack, momenta: list[float | None]) -> list[BatchMoments]:
    rows = torch.cat([track.start[None], track.batches])  # (T + 1, 2C)
    weights = torch.stack([_weights(track, momentum) for momentum in momenta])  # (B, T + 1)
    count = track.num_batches.sum()
    moments = []
    for statistics in weights @ rows:
        mean, unbiased_var = statistics.chunk(2)
        # The biased variance of as many values, from which `unbiased_var` computes this one again.
        moments.append(BatchMoments(count, mean, unbiased_var * ((count - 1).clamp(min=1) / count)))
    return moments


def _weights(track: LayerTrack, momentum: float | None) -> Tensor:
    """Of the start and of each step's batches in the statistics after the last step; they add up to 1, ``(T + 1,)``."""
    knows_start = track.num_batches_before == 0 or track.momenta == {momentum}
    remaining = _remaining(track, momentum, track.num_batches_before if knows_start else 0)
    after = torch.cat([remaining.flip(0).cumprod(0).flip(0), remaining.new_ones(1)])  # all later steps' product
    weights = torch.cat([after[:1], (1 - remaining) * after[1:]])
    if not knows_start:
        weights[0] = 0.0
    return weights / weights.sum()


def _remaining(track: LayerTrack, momentum: float | None, num_batches_before: int) -> Tensor:
    """What each step leaves of the statistics before it, ``(T,)``."""
    if momentum is not None:
        return torch.full_like(track.num_batches, 1 - momentum) ** track.num_batches
    total = num_batches_before + track.num_batches.cumsum(0)
    return 1 - track.num_batches / total.clamp(min=1)
