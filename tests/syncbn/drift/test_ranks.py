"""Ranks against each other: quiet on equal data of any kind, and loud, with the right name, on other data."""

from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from syncbn.drift import ImageMoments, RankContrast

NUM_CHANNELS = 64
LEVEL = 0.01

Draw = Callable[[int, int, torch.Generator], Tensor]


def _normal(num_images: int, num_channels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_images, num_channels, 1, generator=generator)


def _exponential(num_images: int, num_channels: int, generator: torch.Generator) -> Tensor:
    return torch.empty(num_images, num_channels, 1).exponential_(generator=generator)


def _rectified(num_images: int, num_channels: int, generator: torch.Generator) -> Tensor:
    """Positions of an image that depend on each other, behind a ReLU."""
    common = torch.randn(num_images, num_channels, 1, generator=generator)
    return (common + torch.randn(num_images, num_channels, 4, generator=generator)).relu()


def _contrast(images: Sequence[int], num_steps: int, num_trials: int, draw: Draw) -> RankContrast:
    """Of equal data; each trial is a layer of `NUM_CHANNELS` channels."""
    generator, num_channels = torch.Generator().manual_seed(0), NUM_CHANNELS * num_trials
    contrast = RankContrast.empty(len(images), num_channels)
    for _ in range(num_steps):
        contrast = contrast.add([ImageMoments.of(draw(number, num_channels, generator)) for number in images])
    return contrast


@pytest.mark.parametrize(
    ("num_ranks", "num_images", "num_steps", "draw"),
    [
        (2, 2, 20, _normal),
        (4, 2, 20, _normal),
        (4, 2, 20, _exponential),
        (2, 8, 10, _exponential),
        (4, 8, 5, _rectified),
        (2, 32, 4, _rectified),
        (4, 32, 4, _exponential),
    ],
)
def test_the_p_of_equal_data_is_uniform_for_means(num_ranks: int, num_images: int, num_steps: int, draw: Draw) -> None:
    contrast = _contrast([num_images] * num_ranks, num_steps, 10, draw)
    # One rank alone, as the differences of all are not independent; 640 channels are.
    assert stats.kstest(contrast.mean.p[0].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("num_ranks", "num_images", "num_steps", "draw", "num_trials", "at_most"),
    [
        (2, 2, 10, _normal, 1000, 0.02),
        (4, 2, 10, _exponential, 1000, 0.02),
    ],
)
def test_a_false_alarm_in_any_channel_of_any_rank_is_as_rare_as_promised(
    num_ranks: int, num_images: int, num_steps: int, draw: Draw, num_trials: int, at_most: float
) -> None:
    contrast = _contrast([num_images] * num_ranks, num_steps, num_trials, draw)
    least = torch.stack([contrast.mean.p, contrast.variance.p]).view(2, num_ranks, num_trials, NUM_CHANNELS)
    alarms = int((least.amin((0, 1, 3)) < LEVEL / (2 * num_ranks * NUM_CHANNELS)).sum())
    # The upper end of Clopper and Pearson's interval of 95 %.
    assert stats.binomtest(alarms, num_trials).proportion_ci(0.95).high < at_most


@pytest.mark.parametrize("images", [(1, 1), (1, 1, 1), (2, 1, 0, 3)], ids=str)
def test_ranks_with_one_image_or_none_are_compared_as_far_as_they_can_be(images: tuple[int, ...]) -> None:
    mean = _contrast(images, 20, 20, _normal).mean
    for rank, number in enumerate(images):
        if number:
            assert stats.kstest(mean.p[rank].numpy(), "uniform").pvalue > 1e-3
        else:
            assert mean.p[rank].isnan().all()


def test_a_lone_rank_and_a_lone_step_of_single_images_tell_nothing() -> None:
    assert _contrast([8], 3, 1, _normal).mean.z.isnan().all()
    assert _contrast([1, 1], 1, 1, _normal).mean.z.isnan().all()


def _batches(step: int) -> list[Tensor]:
    """Four ranks of six images; rank 2 brighter by 0.3, and rank 1 with more contrast by a third."""
    generator = torch.Generator().manual_seed(step)
    batches = [torch.randn(6, 5, 3, generator=generator) for _ in range(4)]
    return [batches[0], batches[1] * 4 / 3, batches[2] + 0.3, batches[3]]


def test_the_rank_with_other_data_is_named_and_its_size_told() -> None:
    contrast = RankContrast.empty(4, 5)
    for step in range(60):
        contrast = contrast.add([ImageMoments.of(batch) for batch in _batches(step)])
    assert contrast.mean.z.abs().mean(1).argmax() == 2
    assert contrast.variance.z.abs().mean(1).argmax() == 1
    # Rank 1's contrast makes the pooled deviation a tenth larger; tolerances are three standard errors.
    assert contrast.mean.size[2].mean().item() == pytest.approx(0.3 / 1.1, abs=0.06)
    others = (1 + 1 + 1 + 2 * 0.3**2 / 3) / 3
    assert contrast.variance.size[1].exp().mean().item() == pytest.approx(16 / 9 / others, rel=0.12)
    assert (contrast.mean.p[2] < 1e-6).all()


def test_renumbered_ranks_change_nothing_but_their_names() -> None:
    order = [2, 0, 3, 1]
    first, second = RankContrast.empty(4, 5), RankContrast.empty(4, 5)
    for step in range(5):
        ranks = [ImageMoments.of(batch) for batch in _batches(step)]
        first, second = first.add(ranks), second.add([ranks[rank] for rank in order])
    for a, b in ((first.mean, second.mean), (first.variance, second.variance)):
        torch.testing.assert_close(a.z[order], b.z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.p[order], b.p, rtol=1e-9, atol=1e-12)


def test_contrasts_of_disjoint_steps_merge_to_that_of_all() -> None:
    whole, parts = RankContrast.empty(4, 5), [RankContrast.empty(4, 5), RankContrast.empty(4, 5)]
    for step in range(6):
        ranks = [ImageMoments.of(batch) for batch in _batches(step)]
        whole, parts[step % 2] = whole.add(ranks), parts[step % 2].add(ranks)
    merged = parts[0].merge(parts[1])
    assert merged.num_steps == whole.num_steps == 6
    torch.testing.assert_close(merged.variance.z, whole.variance.z, rtol=1e-9, atol=1e-12)
