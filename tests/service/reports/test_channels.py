"""Channels in a bad state, in all of the last samples."""

import math

import pytest

from service.jobs import ChannelState
from service.reports.channels import last_samples, list_channels
from tests.service.reports.records import layer_of, sample_of, sampled


def test_a_channel_counts_if_the_last_three_samples_agree() -> None:
    samples = sampled(
        sample_of(layers=(layer_of("a", dead=(9,)), layer_of("b"))),
        sample_of(layers=(layer_of("a", dead=(1, 2, 3)), layer_of("b", muted=(0,)))),
        sample_of(layers=(layer_of("a", dead=(2, 3)), layer_of("b", muted=(0,)))),
        sample_of(layers=(layer_of("a", dead=(2, 3, 4)), layer_of("b", muted=(0, 5), collapsed=(7,)))),
    )
    found = [(c.layer, c.state, c.num_in_state, c.channels, c.num_channels) for c in list_channels(samples)]
    assert found == [("a", ChannelState.DEAD, 2, (2, 3), 10), ("b", ChannelState.MUTED, 1, (0,), 10)]


@pytest.mark.parametrize(
    ("num_images", "positions", "design_effect", "num_samples", "dead"),
    [
        (64, 1, 1.0, 3, 1),
        (64, 1, 1.0, 2, 0),  # two samples, whatever their size
        (4, 1, 1.0, 24, 0),  # 96 outputs
        (4, 1, 1.0, 25, 1),
        (4, 16, 1.0, 3, 1),
        (4, 16, 16.0, 24, 0),  # 64 outputs an image that are all alike
        (4, 16, math.nan, 24, 0),
        (4, 16, 0.1, 3, 1),
    ],
)
def test_dead_channels_need_a_hundred_independent_outputs(
    num_images: int, positions: int, design_effect: float, num_samples: int, dead: int
) -> None:
    fields = {"num_images": num_images, "positions_per_image": positions, "design_effect": design_effect}
    sample = sample_of(layers=(layer_of(dead=(1,)).model_copy(update=fields),))
    assert len(list_channels(sampled(*[sample] * num_samples))) == dead


def test_of_more_channels_than_are_listed_the_least_number_counts() -> None:
    many = layer_of("a", muted=tuple(range(9))).model_copy(update={"num_channels": 64, "num_muted": 40})
    more = many.model_copy(update={"num_muted": 45})
    (found,) = list_channels(sampled(sample_of(layers=(more,)), sample_of(layers=(many,))))
    assert (found.num_in_state, found.channels) == (40, tuple(range(9)))


def test_only_the_last_attempt_counts_and_no_sample_is_no_finding() -> None:
    bad, good = sample_of(layers=(layer_of(muted=(1,)),)), sample_of()
    samples = sampled(bad, bad) + sampled(good, attempt=2)
    assert last_samples(samples) == (good,)
    assert not list_channels(samples)
    assert list_channels(sampled(good) + sampled(bad, attempt=2))
    assert not list_channels(())
