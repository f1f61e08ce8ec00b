"""Ranks against each other: which differs, where, and by how much."""

import math
from typing import Any

import pytest

from service.jobs import BatchNormSample, DriftColour, RankFinding
from service.reports.ranks import judge_ranks
from tests.service.reports.records import drift_of, finding_of, layer_of, sample_of, spec_of

FOUR = spec_of(num_workers=4)


@pytest.mark.parametrize(
    ("findings", "colour"),
    [
        ([], DriftColour.UNDECIDED),
        ([finding_of(0, 2.0, 0.3), finding_of(1, -5.0, 0.3)], DriftColour.GREEN),  # large, but may be chance
        ([finding_of(0, 2.0, 0.3), finding_of(1, -5.1, -0.09)], DriftColour.AMBER),  # certain, but small
        ([finding_of(0, 2.0, 0.3), finding_of(1, -5.1, -0.1)], DriftColour.RED),
        ([finding_of(1, 9.0, 0.2, min_size=0.3)], DriftColour.AMBER),
        ([finding_of(1, 9.0, 0.2, min_size=None)], DriftColour.RED),
        ([finding_of(0, math.nan, math.nan), finding_of(1, 1.0, 0.0)], DriftColour.GREEN),
    ],
)
def test_a_rank_must_differ_for_certain_and_by_enough(findings: list[RankFinding], colour: DriftColour) -> None:
    assert judge_ranks(sample_of(*findings), [], FOUR).colour is colour


def test_the_rank_the_layer_and_the_direction_are_named() -> None:
    small, large = finding_of(0, 8.0, 0.05), finding_of(2, -6.0, -0.7)
    verdict = judge_ranks(sample_of(small, large), [], FOUR)
    assert verdict.worst == large
    assert "Rank 2 sees other data than the rest: in layer layers.0, channel 3, its mean is 0.7 sd below" in (
        verdict.sentence
    )
    assert "Rank 0" in verdict.sentence
    assert "too little to matter" in verdict.sentence
    variance = judge_ranks(sample_of(finding_of(1, 6.0, math.log(2), "variance")), [], FOUR)
    assert "its variance is 2 times theirs" in variance.sentence


def test_of_two_ranks_none_is_called_the_wrong_one() -> None:
    assert "nothing tells" in judge_ranks(sample_of(finding_of(1, 9.0, 0.5)), [], spec_of()).sentence


@pytest.mark.parametrize("size", [math.inf, -math.inf, math.nan, 1e6])
def test_sizes_of_every_ugliness_are_told(size: float) -> None:
    for quantity in ("mean", "variance"):
        assert judge_ranks(sample_of(finding_of(1, math.inf, size, quantity)), [], FOUR).sentence


def test_buffers_that_differ_are_red_under_sync_alone() -> None:
    apart = [drift_of(0.01, rank_disagreement=0.2)]
    verdict = judge_ranks(None, apart, FOUR)
    assert verdict.colour is DriftColour.RED
    assert "differ between ranks by up to 0.2 sd (layer layers.0)" in verdict.sentence
    assert judge_ranks(None, apart, spec_of(normalization="local")).colour is DriftColour.UNDECIDED
    named = judge_ranks(sample_of(differing_ranks={"norm1": (3,), "norm2": (1, 3)}), [], FOUR)
    assert (named.colour, named.differing_ranks) == (DriftColour.RED, (1, 3))
    assert "layer norm1" in named.sentence
    assert "ranks 1, 3" in named.sentence
    broken = [drift_of(0.01, rank_disagreement=math.nan)]
    assert judge_ranks(sample_of(finding_of(0, 1.0, 0.0)), broken, FOUR).colour is DriftColour.GREEN


def test_a_rank_that_repeats_an_image_is_red() -> None:
    verdict = judge_ranks(sample_of(finding_of(0, 1.0, 0.0), repeating_ranks=(3,)), [], FOUR)
    assert verdict.colour is DriftColour.RED
    assert verdict.sentence == "Rank 3 is fed one image over and over."


@pytest.mark.parametrize(
    ("sample", "fields", "words"),
    [
        (None, {"num_workers": 1}, "One rank"),
        (None, {}, "from the fifth on"),
        (sample_of(layers=(layer_of(),)), {}, "from the fifth"),
        (None, {"diagnostics": {"sample_every_steps": None}}, "set diagnostics.sample_every_steps"),
        (sample_of(finding_of(0, -4.0, 0.1), finding_of(1, 2.0, 0.1)), {}, "at most 4 standard errors, and 5 would"),
    ],
)
def test_where_nothing_is_found_it_is_said_what_was_looked_at(
    sample: BatchNormSample | None, fields: dict[str, Any], words: str
) -> None:
    assert words in judge_ranks(sample, [], spec_of(**fields)).sentence
