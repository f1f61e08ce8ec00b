"""The rank doctor on planted and on equal data: who is found, who is not, and by how much, on moments alone."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from syncbn.drift.ranks import RankContrast
from syncbn.drift.sampling import ImageMoments
from syncbn.monitor import RankDoctor, RankFinding, RankQuantity
from syncbn.monitor.exclusion import without
from syncbn.monitor.normal_score import normal_score, normal_threshold

NUM_RANKS = 4
NUM_CHANNELS = 8
F64 = torch.float64

Fault = Callable[[int, int, Tensor], Tensor]
"""From sample, rank and images to what that rank sees instead."""


def _images(num_images: int, generator: torch.Generator) -> Tensor:
    """Half of the variance is common to the positions of an image, so that positions are far from independent."""
    common = torch.randn(num_images, NUM_CHANNELS, 1, generator=generator)
    return (common + torch.randn(num_images, NUM_CHANNELS, 9, generator=generator)) / math.sqrt(2)


def _diagnose(
    fault: Fault, num_samples: int = 20, sizes: tuple[int, ...] = (8,) * NUM_RANKS, seed: int = 0
) -> tuple[RankDoctor, list[tuple[RankFinding, ...]]]:
    """What a doctor says at each sample of two layers, of which only the second sees the fault."""
    generator = torch.Generator().manual_seed(seed)
    doctor = RankDoctor(len(sizes))
    looks = []
    for sample in range(num_samples):
        first = [_images(size, generator) for size in sizes]
        second = [fault(sample, rank, _images(size, generator)) for rank, size in enumerate(sizes)]
        layers = {"first": first, "second": second}
        looks.append(doctor.look({path: [ImageMoments.of(x) for x in ranks] for path, ranks in layers.items()}))
    return doctor, looks


def _healthy(_: int, __: int, images: Tensor) -> Tensor:
    return images


def _brighter(_: int, rank: int, images: Tensor) -> Tensor:
    images[:, 3] += 1.0 * (rank == 2)
    return images


def _more_contrast(_: int, rank: int, images: Tensor) -> Tensor:
    return images * (1.5 if rank == 2 else 1.0)


def _two_differ(_: int, rank: int, images: Tensor) -> Tensor:
    images[:, 1] += {0: 2.0, 3: -0.7}.get(rank, 0.0)
    return images


def _late(sample: int, rank: int, images: Tensor) -> Tensor:
    return images + 0.7 * (rank == 1 and sample >= 60)


def test_equal_data_raise_no_alarm_in_thirty_runs() -> None:
    for seed in range(30):
        sizes = ((2,) * 4, (8, 1, 5, 2), (3, 0, 4, 4))[seed % 3]
        doctor, looks = _diagnose(_healthy, num_samples=8, sizes=sizes, seed=seed)
        assert not any(finding.is_significant for findings in looks for finding in findings)
        assert doctor.repeating_ranks == ()


@pytest.mark.parametrize("num_images", [2, 8])
def test_a_brighter_rank_is_named_with_layer_channel_and_size(num_images: int) -> None:
    _, looks = _diagnose(_brighter, num_samples=25, sizes=(num_images,) * NUM_RANKS)
    others = [looks[-1][rank] for rank in (0, 1, 3)]
    finding = looks[-1][2]
    assert finding.fires
    assert (finding.rank, finding.layer, finding.channel, finding.quantity) == (2, "second", 3, RankQuantity.MEAN)
    assert finding.size == pytest.approx(1 / math.sqrt(1 + 3 / 16), abs=0.25)  # over the sd of all ranks
    assert finding.z > finding.threshold
    assert not any(other.is_significant for other in others)  # though each is below the mean of the rest
    assert str(finding).startswith("rank 2 sees other data: 0.")
    assert "standard deviations higher in channel 3 of second" in str(finding)


def test_a_rank_with_more_contrast_is_named() -> None:
    _, looks = _diagnose(_more_contrast)
    finding = looks[-1][2]
    assert finding.fires
    assert (finding.layer, finding.quantity) == ("second", RankQuantity.VARIANCE)
    assert finding.size == pytest.approx(math.log(1.5**2), abs=0.4)
    assert "variance above the others' by" in str(finding)
    assert not any(looks[-1][rank].is_significant for rank in (0, 1, 3))


def test_two_ranks_that_differ_are_both_named_and_the_others_not() -> None:
    for sizes in ((8,) * 4, (4, 12, 8, 6)):
        _, looks = _diagnose(_two_differ, sizes=sizes)
        assert [finding.fires for finding in looks[-1]] == [True, False, False, True]
        assert looks[-1][0].size > 0 > looks[-1][3].size


def test_of_two_ranks_both_are_named_because_nothing_tells_which_is_right() -> None:
    _, looks = _diagnose(lambda _, rank, images: images + 0.8 * rank, sizes=(8, 8))
    assert [finding.fires for finding in looks[-1]] == [True, True]
    assert looks[-1][0].size == pytest.approx(-looks[-1][1].size, rel=1e-6)


def test_a_fault_that_begins_late_is_found_within_a_window() -> None:
    _, looks = _diagnose(_late, num_samples=75)
    assert not any(finding.is_significant for findings in looks[:60] for finding in findings)
    (finding,) = [finding for finding in looks[-1] if finding.fires]
    assert finding.rank == 1
    assert finding.num_samples == 15


@pytest.mark.parametrize("constant", [False, True])
def test_a_rank_that_repeats_one_image_is_named(constant: bool) -> None:
    def repeated(_: int, rank: int, images: Tensor) -> Tensor:
        if rank != 1:
            return images
        return torch.zeros_like(images) + 0.25 if constant else images[:1].expand_as(images)

    generator = torch.Generator().manual_seed(0)
    doctor = RankDoctor(NUM_RANKS)
    for _ in range(3):
        assert doctor.repeating_ranks == ()
        ranks = [repeated(0, rank, _images(4, generator)) for rank in range(NUM_RANKS)]
        doctor.look({"first": [ImageMoments.of(images) for images in ranks]})
    assert doctor.repeating_ranks == (1,)


def test_a_channel_that_never_varies_accuses_nobody() -> None:
    def constant(_: int, rank: int, images: Tensor) -> Tensor:
        images[:, 0] = 0.1 + 1e-8 * rank
        return images

    _, looks = _diagnose(constant, num_samples=10)
    assert not any(finding.is_significant for findings in looks for finding in findings)


def test_a_step_that_is_not_finite_spoils_no_later_one() -> None:
    def broken(sample: int, rank: int, images: Tensor) -> Tensor:
        return _brighter(sample, rank, images) * (math.nan if sample == 3 and rank == 0 else 1.0)

    _, looks = _diagnose(broken)
    assert [finding.fires for finding in looks[-1]] == [False, False, True, False]
    assert looks[-1][2].num_samples == 19


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (3, 9, 4, 6)])
def test_without_a_rank_is_the_contrast_of_the_rest(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    whole, rest = RankContrast.empty(4, NUM_CHANNELS), RankContrast.empty(3, NUM_CHANNELS)
    for _ in range(6):
        ranks = [ImageMoments.of(_brighter(0, rank, _images(size, generator))) for rank, size in enumerate(sizes)]
        whole, rest = whole.add(ranks), rest.add([ranks[0], ranks[1], ranks[3]])
    share = torch.tensor(sizes, dtype=F64) / sum(sizes)
    others = without(whole, 2, share)
    torch.testing.assert_close(others.weights[:, [0, 1, 3]], rest.weights, rtol=1e-12, atol=0)
    # Of the mean, differences alone do not depend on about which mean they are taken.
    torch.testing.assert_close(others.sums[0, 0][[0, 1, 3]], rest.sums[0, 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(others.sums[:, :, 2], whole.sums[:, :, 2], rtol=0, atol=0)
    # All that is left of the rank is its part in the noise, and in the mean that squares are taken about.
    torch.testing.assert_close(others.mean.z[[0, 1, 3]], rest.mean.z, rtol=0.3, atol=0.2)


def test_a_normal_score_bounds_the_exact_one_from_below() -> None:
    for degrees, slack in ((2, 0.08), (8, 0.015), (40, 0.001)):
        p = torch.tensor([0.02, 1e-3, 1e-6, 1e-9, 1e-12], dtype=F64)
        t = torch.from_numpy(stats.t.isf(p.numpy(), degrees))
        exact = torch.from_numpy(stats.norm.isf(p.numpy()))
        score = normal_score(t, torch.tensor(float(degrees), dtype=F64))
        assert (score <= exact).all()
        assert (score >= (1 - slack) * exact).all()
        torch.testing.assert_close(normal_score(-t, torch.tensor(float(degrees), dtype=F64)), -score)


def test_thresholds_are_two_sided() -> None:
    assert normal_threshold(0.05) == pytest.approx(1.959963984540054, rel=1e-12)


@pytest.mark.parametrize("false_alarms", [0.0, 1.0])
def test_a_rate_of_false_alarms_that_is_none_is_refused(false_alarms: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        RankDoctor(2, false_alarms=false_alarms)
