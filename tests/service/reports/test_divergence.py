"""Where a number that is not finite began, from what the ranks found."""

import math

import pytest

from service.jobs import ConvergenceVerdict, NonFinite, NonFinitePlace
from service.reports import find_origin, judge_convergence

_PLACE = NonFinitePlace


def _found(rank: int, place: NonFinitePlace, tensor: str = "", step: int = 7) -> tuple[int, NonFinite]:
    return rank, NonFinite(step=step, place=place, tensor=tensor)


def test_the_earliest_place_in_order_of_execution_is_the_origin() -> None:
    facts = [_found(0, _PLACE.OTHER_RANK), _found(2, _PLACE.ACTIVATION, "norm1"), _found(1, _PLACE.INPUT)]
    origin = find_origin(facts)
    assert origin is not None
    assert (origin.place, origin.ranks, origin.step) == (_PLACE.INPUT, (1,), 7)


def test_ranks_that_found_the_same_tensor_are_named_together() -> None:
    origin = find_origin([_found(r, _PLACE.PARAMETER, "head.weight") for r in (3, 0)])
    assert origin is not None
    assert (origin.ranks, origin.tensor) == ((0, 3), "head.weight")


def test_a_later_step_is_no_origin_and_nothing_found_is_none() -> None:
    origin = find_origin([_found(0, _PLACE.PARAMETER, "a", step=9), _found(1, _PLACE.LOSS, step=8)])
    assert origin is not None
    assert origin.step == 8
    assert find_origin([]) is None


def test_the_verdict_names_tensor_and_rank() -> None:
    losses = [1.0] * 6 + [math.nan] * 4
    verdict = judge_convergence(range(1, 11), losses, non_finite=[_found(1, _PLACE.ACTIVATION, "norm2")])
    assert (verdict.verdict, verdict.first_non_finite_step) == (ConvergenceVerdict.DIVERGED, 7)
    assert verdict.non_finite is not None
    assert "in the output of norm2, on rank 1" in verdict.sentence


def test_a_finding_ahead_of_the_recorded_losses_is_a_divergence() -> None:
    """The rank may die before it tells the loss."""
    verdict = judge_convergence(range(1, 7), [1.0] * 6, non_finite=[_found(0, _PLACE.PARAMETER, "w")])
    assert (verdict.verdict, verdict.first_non_finite_step) == (ConvergenceVerdict.DIVERGED, 7)


def test_a_finding_that_a_resumed_run_has_got_past_does_not_count() -> None:
    verdict = judge_convergence(range(1, 301), [1.0] * 300, non_finite=[_found(0, _PLACE.PARAMETER, "w")])
    assert verdict.verdict is ConvergenceVerdict.PLATEAU


@pytest.mark.parametrize("place", list(NonFinitePlace))
def test_every_place_has_words(place: NonFinitePlace) -> None:
    verdict = judge_convergence([7], [math.inf], non_finite=[_found(0, place, "layer")])
    assert "It began in " in verdict.sentence
