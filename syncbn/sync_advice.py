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

from syncbn.rank_variances import LayerBatches, LayerVariances, measure_variances

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


@dataclass(frozen=True)
class SyncAdvice:
    """The verdict, the layer that says most for it, and all layers in the order given.

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
    return _judge(measure_variances(dict(zip(layers, kept, strict=True)), seed), num_steps, num_ranks, size)


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
