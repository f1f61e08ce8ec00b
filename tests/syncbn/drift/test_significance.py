"""Probabilities against scipy, and z of equal data against the distribution it claims."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from syncbn.drift import (
    ImageMoments,
    batch_deviation,
    normal_equivalent,
    population_deviation,
    threshold,
    two_sided_p,
)
from tests.syncbn.drift.fields import field

F64 = torch.float64


@pytest.mark.parametrize("degrees", [1, 2.5, 7, 60, 199, 201, 5e3, math.inf])
def test_probabilities_and_thresholds_are_scipys(degrees: float) -> None:
    distribution = stats.norm() if math.isinf(degrees) else stats.t(degrees)
    z = np.array([0.0, 1e-3, 0.5, -1.96, 4.3, 10])
    np.testing.assert_allclose(two_sided_p(torch.tensor(z), degrees), 2 * distribution.sf(np.abs(z)), rtol=2e-8)
    for level, num_tests in ((0.05, 1), (0.01, 256), (0.01, 10**6)):
        expected = distribution.isf(level / num_tests / 2)
        assert threshold(level, num_tests, degrees).item() == pytest.approx(expected, rel=1e-9)
    equivalent = normal_equivalent(torch.tensor(z), degrees)
    np.testing.assert_allclose(two_sided_p(equivalent), 2 * distribution.sf(np.abs(z)), rtol=2e-8)
    assert equivalent[3] < 0


def test_degrees_may_differ_by_element_and_nothing_known_is_no_number() -> None:
    degrees = torch.tensor([3.0, 300.0, math.inf, math.nan], dtype=F64)
    found = threshold(0.01, 64, degrees)
    assert found[:3].tolist() == pytest.approx([threshold(0.01, 64, float(f)).item() for f in degrees[:3]], rel=1e-12)
    assert found[3].isnan()
    assert two_sided_p(torch.tensor([math.nan, math.inf]), 5.0).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="level between 0 and 1"):
        threshold(1.0, 3)


@pytest.mark.parametrize(("num_images", "kind"), [(4, "normal"), (16, "normal"), (32, "skewed")])
def test_batches_and_populations_like_those_averaged_deviate_by_chance_alone(num_images: int, kind: str) -> None:
    generator, momentum, num_repeats = torch.Generator().manual_seed(4), 0.3, 1000

    def images(number: int) -> torch.Tensor:
        values = field(number, num_repeats, 4, 0.8, generator)
        return values if kind == "normal" else values.square().neg().exp()

    running_mean = ImageMoments.of(images(512)).mean
    for _ in range(30):
        running_mean = running_mean.lerp(images(num_images).mean((0, 2)), momentum)
    batch = batch_deviation(ImageMoments.of(images(num_images)), running_mean, momentum)
    population = population_deviation(running_mean, ImageMoments.of(images(200)), momentum, num_images)
    for deviation in (batch, population):
        p = two_sided_p(deviation.z, deviation.degrees)
        assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    rms, expected = population.size.square().mean().sqrt(), population.expected_size.square().mean().sqrt()
    assert (rms / expected).item() == pytest.approx(1, abs=0.1)
