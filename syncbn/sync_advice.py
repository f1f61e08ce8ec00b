"""Sync or not: whether a layer's batch statistics should be taken over all ranks, judged by some local steps.

Two variances decide. Within a rank, the means of single images differ by ``s2``: the mean of its batch of ``n`` images
is off by ``s2 / n`` by chance, which a larger batch makes smaller, be it the rank's own or that of all. Between ranks,
means differ by ``t2`` more than by chance, alike in every step: that is in their data, and stays whatever the batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from syncbn.drift.significance import threshold

LOCAL_VALUES = 12
"""So many independent values a channel are enough for a rank alone: halfway, by factors, between 8 and 16."""
GLOBAL_VALUES = 6
"""With fewer, over all ranks together, no batch statistic is worth having: halfway between 4 and 8."""
SHARD_DIFFERENCE = 0.005
"""Of ``t2 / s2``, if beyond chance: as much as random shards of 200 images differ."""
SHARD_DOUBT = 0.02
"""Of ``t2 / s2``: where so much, as of random shards of 50 images, is not excluded, nobody is told not to care."""
LEVEL = 0.01
"""Probability that ranks with equal data are held to differ, over all layers together."""
FEWEST_STEPS = 10
_NUM_SHUFFLES = 999
_SHUFFLES_AT_ONCE = 100


class Verdict(StrEnum):
    """What to do about the statistics of a batch."""

    NO_NEED = "no_need"
    """Local statistics rest on enough, and the ranks' data are alike."""
    SYNC = "sync"
    LARGER_LOCAL_BATCH = "larger_local_batch"
    """At most twice the batch is enough for a rank alone, and costs no exchange; sync does as well."""
    GROUP_NORM = "group_norm"
    """Even all ranks together hold too few values: a norm that needs no batch, or far more images."""
    UNDECIDED = "undecided"
    """The measurement leaves room for more than one of these; take more steps."""


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


@dataclass(frozen=True)
class SyncAdvice:
    """The verdict, the layer that says most for it, and all layers in order of execution.

    ``local_batch_size`` is the mean over ranks and steps, ``enough_images`` the local batch from which on the noisiest
    layer rests on enough. ``sentence`` says it all.
    """

    verdict: Verdict
    sentence: str
    layer: str
    num_steps: int
    num_ranks: int
    local_batch_size: float
    enough_images: int
    layers: tuple[LayerVariances, ...]


def advise(layers: Mapping[str, LayerBatches], *, seed: int = 0) -> SyncAdvice:
    """The advice for ``layers``, all of the same steps and ranks; a pure function, of ``seed`` too.

    Whether ranks differ is tested by shuffling the ranks in every step: if they see equal data they are exchangeable
    there, whatever the network and however fast its weights move. The test is exact for batches alike in size.
    Channels without variance do not count; nor do steps in which some rank had no image.

    Raises:
        ValueError: without a layer; if what a layer was fed is not finite.
    """
    if not layers:
        raise ValueError("no layer was fed anything in training mode; take steps before asking for advice")
    for path, batches in layers.items():
        if not bool(batches.mean.isfinite().all() & batches.var.isfinite().all()):
            raise ValueError(f"what layer {path} was fed is not finite: the run has diverged, and no batch helps")
    images = torch.stack([batches.images for batches in layers.values()]).amin(0)  # (K, R)
    full = (images > 0).all(1)
    num_steps, num_ranks = int(full.sum()), images.size(1)
    size = float(images[full].mean()) if num_steps else 0.0
    if num_steps < FEWEST_STEPS:
        text = f"only {num_steps} steps in which every rank had images; {FEWEST_STEPS} are the least to judge by"
        return SyncAdvice(Verdict.UNDECIDED, text, "", num_steps, num_ranks, size, 0, ())
    if num_ranks == 1 and not bool((images > 1).all()):
        text = "single images on a single rank do not tell how images differ; take two or more"
        return SyncAdvice(Verdict.UNDECIDED, text, "", num_steps, num_ranks, size, 0, ())
    kept = [
        LayerBatches(batches.images[full], batches.mean[full], batches.var[full], batches.between_var[full])
        for batches in layers.values()
    ]
    return _judge(_measure(list(layers), kept, seed), num_steps, num_ranks, size)


def _judge(layers: Sequence[LayerVariances], num_steps: int, num_ranks: int, size: float) -> SyncAdvice:
    noisiest = max(layers, key=lambda layer: layer.by_chance.value)
    different = max(layers, key=lambda layer: layer.by_rank.value if layer.p_value <= LEVEL else -math.inf)
    differs = different.p_value <= LEVEL and different.by_rank.value >= SHARD_DIFFERENCE
    may_differ = differs or any(layer.by_rank.high >= SHARD_DOUBT for layer in layers)
    noise = noisiest.by_chance
    verdicts = {_decide(value, differs, num_ranks) for value in (noise.low, noise.value, noise.high)}
    if Verdict.NO_NEED in verdicts and may_differ:
        verdicts.add(Verdict.SYNC)
    verdict = next(iter(verdicts)) if len(verdicts) == 1 else Verdict.UNDECIDED
    worst = different if differs else noisiest
    advice = SyncAdvice(
        verdict=verdict,
        sentence="",
        layer=worst.layer,
        num_steps=num_steps,
        num_ranks=num_ranks,
        local_batch_size=size,
        enough_images=max(1, math.ceil(LOCAL_VALUES * size * noise.value - 1e-9)),
        layers=tuple(layers),
    )
    return _told(advice, noisiest, different if differs else None, sorted(verdicts))


def _decide(chance: float, differs: bool, num_ranks: int) -> Verdict:
    """From the variance of a local mean by chance, and whether ranks differ by more than that."""
    num_values = 1 / max(chance, 1e-12)
    if num_values * num_ranks < GLOBAL_VALUES:
        return Verdict.GROUP_NORM
    if differs:
        return Verdict.SYNC
    if num_values >= LOCAL_VALUES:
        return Verdict.NO_NEED
    if 2 * num_values >= LOCAL_VALUES or num_ranks == 1:
        return Verdict.LARGER_LOCAL_BATCH
    return Verdict.SYNC


def _told(
    advice: SyncAdvice, noisiest: LayerVariances, different: LayerVariances | None, candidates: Sequence[Verdict]
) -> SyncAdvice:
    noise, num_values = noisiest.by_chance, 1 / max(noisiest.by_chance.value, 1e-12)
    facts = (
        f"in layer {noisiest.layer} the mean of a local batch of {advice.local_batch_size:.3g} is off by "
        f"{math.sqrt(max(noise.value, 0)):.2g} sigma by chance (variance {noise.value:.2g}, {noise.low:.2g} to "
        f"{noise.high:.2g}), as one of {num_values:.2g} independent values"
    )
    if different is not None:
        by_rank = different.by_rank
        facts += (
            f"; in layer {different.layer} ranks differ in every step, by {by_rank.value:.2g} of the variance over "
            f"images ({by_rank.low:.2g} to {by_rank.high:.2g}; p = {different.p_value:.2g})"
        )
    undecided = f"undecided between {' and '.join(candidates)}, take more steps"
    what = _WHAT_TO_DO.get(advice.verdict, undecided)
    sentence = f"{what}: {facts}"
    if advice.verdict is Verdict.LARGER_LOCAL_BATCH:
        sentence += f"; {advice.enough_images} images a rank are enough"
    return replace(advice, sentence=sentence)


_WHAT_TO_DO = {
    Verdict.NO_NEED: "no need to synchronize (Goyal et al. 2017 keep the statistics of 32 images a worker on purpose: "
    "the loss then stays the same function whatever the number of workers)",
    Verdict.SYNC: "synchronize the statistics",
    Verdict.LARGER_LOCAL_BATCH: "take a larger local batch, or synchronize",
    Verdict.GROUP_NORM: "use GroupNorm, or far larger batches: all ranks together hold too few values",
}


def _measure(paths: Sequence[str], layers: Sequence[LayerBatches], seed: int) -> list[LayerVariances]:
    withins = [_within(batches) for batches in layers]
    contrasts = [_contrast(batches, within) for batches, within in zip(layers, withins, strict=True)]
    p_values = _p_values(contrasts, seed)
    quantile = float(threshold(0.05, 1, len(layers[0].images) - 1))  # of Student's t, one degree less than steps
    return [
        LayerVariances(path, _by_chance(batches, within, quantile), _by_rank(contrast, quantile), p_value)
        for path, batches, within, contrast, p_value in zip(paths, layers, withins, contrasts, p_values, strict=True)
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
