"""Advice from planted data, and from real ranks that train."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import RanksDisagree
from syncbn.rank_variances import LayerBatches
from syncbn.survey import RankSurvey
from syncbn.sync_advice import SyncAdvice, Verdict, advise
from tests.ranks import run_ranks

STEPS = 20


def _fed(images: Tensor) -> LayerBatches:
    """From values ``(K, R, n, C, S)``, in numpy."""
    values = images.double().numpy()
    means = values.mean(4)
    between = means.var(2, ddof=1) if values.shape[2] > 1 else np.full_like(means[:, :, 0], np.nan)
    arrays = np.full(values.shape[:2], values.shape[2]), values.mean((2, 4)), values.var((2, 4)), between
    return LayerBatches(*(torch.tensor(array, dtype=torch.float64) for array in arrays))


def _drawn(
    seed: int, num_ranks: int, num_images: int, positions: int = 1, offset: float = 0.0, common: float = 1.0
) -> LayerBatches:
    """40 channels of skewed values; the last rank's are higher by ``offset``. ``common`` to all of an image's."""
    generator = torch.Generator().manual_seed(seed)
    size = (STEPS, num_ranks, num_images, 40)
    own = torch.randn(*size, positions, generator=generator) * (1 - common**2) ** 0.5
    images = torch.empty(*size, 1).exponential_(generator=generator) * common + own
    images[:, -1] += offset
    return _fed(images)


@pytest.mark.parametrize(
    ("num_ranks", "num_images", "expected"),
    [
        (4, 32, Verdict.NO_NEED),
        (2, 16, Verdict.NO_NEED),
        (2, 8, Verdict.LARGER_LOCAL_BATCH),
        (2, 4, Verdict.SYNC),
        (4, 2, Verdict.SYNC),
        (2, 2, Verdict.GROUP_NORM),
        (1, 32, Verdict.NO_NEED),
        (1, 8, Verdict.LARGER_LOCAL_BATCH),
        (1, 4, Verdict.GROUP_NORM),
    ],
)
def test_a_fully_connected_layer_needs_as_many_images_as_values(
    num_ranks: int, num_images: int, expected: Verdict
) -> None:
    advice = advise({"norm": _drawn(1, num_ranks, num_images)})
    assert advice.verdict is expected
    (layer,) = advice.layers
    assert layer.by_chance.value == pytest.approx(1 / num_images, rel=0.1)
    assert layer.by_chance.low <= 1 / num_images * 1.05
    assert advice.enough_images in (11, 12)


def test_positions_that_differ_within_an_image_count_as_values() -> None:
    few = advise({"conv": _drawn(2, 4, 4, positions=16, common=0.3)})
    # The mean of an image varies by 0.09 + 0.91 / 16, so that 4 images weigh as 27 independent values.
    assert few.layers[0].by_chance.value == pytest.approx((0.09 + 0.91 / 16) / 4, rel=0.1)
    assert few.verdict is Verdict.NO_NEED
    assert advise({"conv": _drawn(2, 4, 4, positions=16)}).verdict is Verdict.SYNC


def test_ranks_with_other_data_are_found_whatever_the_batch_and_their_difference_is_measured() -> None:
    for num_images in (16, 64):
        advice = advise({"other": _drawn(3, 4, num_images), "norm": _drawn(4, 4, num_images, offset=0.4)})
        assert (advice.verdict, advice.layer) == (Verdict.SYNC, "norm")
        by_rank = advice.layers[1].by_rank
        # One of four means is 0.4 higher: their variance, over three degrees of freedom, is 0.16 / 4.
        assert by_rank.low < 0.04 < by_rank.high
        assert by_rank.value == pytest.approx(0.04, rel=0.4)


def test_equal_ranks_are_rarely_said_to_differ() -> None:
    num_runs, false = 30, 0
    for seed in range(num_runs):
        advice = advise({f"norm{i}": _drawn(100 + 2 * seed + i, 2, 16) for i in range(2)}, seed=seed)
        false += min(layer.p_value for layer in advice.layers) <= 0.01
        assert advice.verdict in (Verdict.NO_NEED, Verdict.SYNC)
        assert (advice.verdict is Verdict.SYNC) <= (min(layer.p_value for layer in advice.layers) <= 0.01)
    assert false <= 3  # at a rate of 0.01 more than 3 of 30 come once in 4500 times


def test_what_is_not_enough_to_judge_by_is_undecided_or_refused() -> None:
    short = advise({"norm": LayerBatches(*(part[:9] for part in vars(_drawn(5, 2, 8)).values()))})
    assert (short.verdict, short.num_steps) == (Verdict.UNDECIDED, 9)
    assert "only 9 steps" in short.sentence
    assert advise({"norm": _drawn(6, 1, 1)}).verdict is Verdict.UNDECIDED
    between = advise({"norm": _drawn(7, 2, 4, positions=4, common=1 / 3)})  # as 12 of 16 values, more or less
    assert (between.verdict, "undecided between larger_local_batch and no_need" in between.sentence) == (
        Verdict.UNDECIDED,
        True,
    )
    with pytest.raises(ValueError, match="layer norm was fed is not finite"):
        advise({"norm": _drawn(8, 2, 4, offset=float("nan"))})
    with pytest.raises(ValueError, match="no layer was fed anything"):
        advise({})


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        hidden = [nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(48, 10))
    convs = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 10))


def _train_and_ask(kind: str, batch_size: int, by_class: bool, seed: int) -> SyncAdvice:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(load_digits().target)
    shard = torch.nonzero(labels * num_ranks // 10 == rank).flatten() if by_class else torch.arange(len(labels))
    generator = torch.Generator().manual_seed(100 * seed + rank)
    replica: nn.Module = DistributedDataParallel(_model(kind))
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.05, momentum=0.9)
    with RankSurvey(replica) as survey:
        for _ in range(STEPS):
            chosen = shard[torch.randint(len(shard), (batch_size,), generator=generator)]
            torch.autograd.backward(nn.functional.cross_entropy(replica(images[chosen]), labels[chosen]))
            optimizer.step()
            optimizer.zero_grad()
            replica.train(False)
            replica(images[:3])  # does not count
            replica.train(True)
            survey.step()
        assert any(module._forward_pre_hooks for module in replica.modules())
        advice = survey.advice()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in replica.modules())
    return advice


def _ask_for_all() -> list[SyncAdvice]:
    cases = (("conv", 32, False), ("conv", 32, True), ("mlp", 4, False), ("mlp", 2, False))
    return [_train_and_ask(*case, seed) for case in cases for seed in (0, 1)]


def test_ranks_that_train_are_told_the_same_and_the_right_thing() -> None:
    first, second = run_ranks(2, _ask_for_all, timeout_s=100.0)
    assert first == second
    expected = [Verdict.NO_NEED, Verdict.SYNC, Verdict.SYNC, Verdict.GROUP_NORM]
    assert [advice.verdict for advice in first] == [verdict for verdict in expected for _ in range(2)]
    assert "Goyal" in first[0].sentence


def _step_unevenly() -> None:
    survey = RankSurvey(_model("mlp"))
    for _ in range(1 + torch.distributed.get_rank()):
        survey.step()
    with pytest.raises(RanksDisagree, match="survey of BatchNorm layers over 1 steps"):
        survey.advice()
    survey.close()


def test_ranks_that_took_different_numbers_of_steps_are_told_so() -> None:
    run_ranks(2, _step_unevenly)


def test_a_survey_without_layers_or_after_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no BatchNorm"):
        RankSurvey(nn.Linear(2, 2))
    survey = RankSurvey(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="take steps before"):
        survey.advice()
    survey.close()
    with pytest.raises(RuntimeError, match="closed"):
        survey.step()
