"""Variances of batch means, by chance within a rank and between ranks, from some steps; see `syncbn.sync_advice`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.significance import threshold

_NUM_SHUFFLES = 999
_SHUFFLES_AT_ONCE = 100


@dataclass(frozen=True, eq=False)
class LayerBatches:
    """What a layer was fed in ``K`` steps on ``R`` ranks, ``C`` channels; float64.

    Shape: ``images`` ``(K, R)``; ``mean`` of the batch, biased ``var`` of its values and unbiased ``between_var`` over
        the means of its images (NaN with fewer than two), all ``(K, R, C)``.
    """

    images: Tensor
    mean: Tensor
    var: Tensor
    between_var: Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, from how steps differ."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerVariances:
    """Of one layer, on average over its channels; no number depends on their scale.

    ``by_chance``: ``s2 / (n q)``, with the variance ``q`` of all values: its inverse is the number of independent
        values that a local statistic rests on.
    ``by_rank``: ``t2 / s2``; below 0 by chance where there is no difference, 0 for a single rank.
    ``p_value``: of no difference between ranks, corrected for the number of layers; 1 for a single rank.
    """

    layer: str
    by_chance: Estimate
    by_rank: Estimate
    p_value: float


def measure_variances(layers: Mapping[str, LayerBatches], seed: int) -> list[LayerVariances]:
    """Of ``layers``, all of the same steps and ranks, every rank with images in every step; in their order.

    ``seed`` is that of the shuffles by which the p-values are found.
    """
    batches_of = list(layers.values())
    withins = [_within(batches) for batches in batches_of]
    contrasts = [_contrast(batches, within) for batches, within in zip(batches_of, withins, strict=True)]
    p_values = _p_values(contrasts, seed)
    quantile = float(threshold(0.05, 1, len(batches_of[0].images) - 1))  # of Student's t, one degree less than steps
    return [
        LayerVariances(path, _by_chance(batches, within, quantile), _by_rank(contrast, quantile), p_value)
        for path, batches, within, contrast, p_value in zip(
            layers, batches_of, withins, contrasts, p_values, strict=True
        )
    ]


def _within(batches: LayerBatches) -> Tensor:
    """``s2`` of each step, over all ranks, ``(K, C)``. From how their means differ if no rank has two images."""
    degrees = (batches.images - 1).clamp(min=0).unsqueeze(2)  # (K, R, 1)
    if bool((degrees > 0).any(1).all()):
        return (batches.between_var.nan_to_num() * degrees).sum(1) / degrees.sum(1)
    return batches.mean.var(1) * batches.images.mean(1, keepdim=True)


def _contrast(batches: LayerBatches, within: Tensor) -> Tensor:
    """Each rank's mean less that of all in the same step, ``(K, R, C')``; squares sum over ``C'`` to a mean of them."""
    scale = within.mean(0)
    varies = scale > 0
    deviation = batches.mean - batches.mean.mean(1, keepdim=True)
    return (deviation / scale.sqrt())[..., varies] / math.sqrt(max(int(varies.sum()), 1))


def _by_chance(batches: LayerBatches, within: Tensor, quantile: float) -> Estimate:
    weight = batches.images / batches.images.sum(1, keepdim=True)
    mean = (weight.unsqueeze(2) * batches.mean).sum(1, keepdim=True)  # (K, 1, C)
    values = (weight.unsqueeze(2) * (batches.var + (batches.mean - mean).square())).sum(1)
    values = values + within / batches.images.sum(1, keepdim=True)  # what the mean itself varies by
    varies = values.mean(0) > 0
    share = _of_images(within.mean(0), values.mean(0))[varies]
    shares = _of_images(_without_each(within), _without_each(values))[:, varies]
    of_image = (1 / batches.images).mean()
    return _jackknife(share.mean() * of_image, shares.mean(1) * of_image, quantile)


def _of_images(within: Tensor, values: Tensor) -> Tensor:
    """Share of the variance that lies between images; at most all of it, whatever few values make it seem."""
    return (within / values).clamp(max=1)


def _by_rank(contrast: Tensor, quantile: float) -> Estimate:
    num_ranks = contrast.size(1)
    if num_ranks == 1:
        return Estimate(0.0, 0.0, 0.0)
    products = torch.einsum("krc,lrc->kl", contrast, contrast) / (num_ranks - 1)
    num_steps = len(products)
    # Two steps have nothing in common but the difference between ranks, and it is what their products leave.
    others = products.sum(1) - products.diagonal()
    pairs = others.sum()
    without = (pairs - 2 * others) / ((num_steps - 1) * (num_steps - 2))
    return _jackknife(pairs / (num_steps * (num_steps - 1)), without, quantile)


def _without_each(by_step: Tensor) -> Tensor:
    """The mean without each step in turn."""
    return (by_step.sum(0) - by_step) / (len(by_step) - 1)


def _jackknife(value: Tensor, without: Tensor, quantile: float) -> Estimate:
    """Tukey 1958: from the estimates without each step in turn, as many standard errors wide as ``quantile`` says."""
    num_steps = len(without)
    error = float((without - without.mean()).square().sum() * (num_steps - 1) / num_steps) ** 0.5
    margin = quantile * error
    return Estimate(float(value), float(value) - margin, float(value) + margin)


def _p_values(contrasts: Sequence[Tensor], seed: int) -> list[float]:
    """By layer, how often shuffled ranks differ as much in any layer; step-wise shuffles, alike in all layers."""
    num_steps, num_ranks = contrasts[0].shape[:2]
    if num_ranks == 1:
        return [1.0] * len(contrasts)
    generator = torch.Generator().manual_seed(seed)
    joined, sizes = torch.cat(list(contrasts), dim=2), [contrast.size(2) for contrast in contrasts]
    observed = _differences(torch.arange(num_ranks).expand(1, num_steps, num_ranks), joined, sizes)
    shuffles = torch.rand(_NUM_SHUFFLES, num_steps, num_ranks, generator=generator).argsort(2)
    shuffled = torch.cat([_differences(part, joined, sizes) for part in torch.split(shuffles, _SHUFFLES_AT_ONCE)])
    center, spread = shuffled.mean(0), shuffled.std(0).clamp(min=1e-300)
    largest = ((shuffled - center) / spread).amax(1)  # of all layers, so that their number is paid for
    exceeding = (largest.unsqueeze(1) >= (observed - center) / spread).sum(0)
    p_values: list[float] = ((1 + exceeding) / (1 + _NUM_SHUFFLES)).tolist()
    return p_values


def _differences(orders: Tensor, contrast: Tensor, sizes: Sequence[int]) -> Tensor:
    """By order of ranks in each step ``(B, K, R)`` and by layer, the square of the ranks' means, up to a factor."""
    num_orders, _, num_ranks = orders.shape
    chosen = torch.nn.functional.one_hot(orders, num_ranks).permute(0, 2, 1, 3)  # (B, R, K, R)
    sums = chosen.reshape(num_orders * num_ranks, -1).to(contrast) @ contrast.flatten(0, 1)
    squares = sums.view(num_orders, num_ranks, -1).square().sum(1)  # (B, sum of C)
    return torch.stack([part.sum(1) for part in torch.split(squares, list(sizes), dim=1)], dim=1)
