from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from service.jobs import Drift, Evaluation
from service.training.context import RankContext
from service.training.dataset import Dataset
from service.training.evaluation import make_examiner
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _context(rank: int = 0, world_size: int = 1) -> RankContext:
    return RankContext(rank, world_size, CPU, Path("unused"))


def _dataset(num_train: int = 1100, num_validation: int = 37) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_train + num_validation, 1, 2, 3, generator=generator, dtype=torch.float64) + 0.3
    labels = torch.randint(3, (num_train + num_validation,), generator=generator)
    return Dataset(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], 3)


def _model(rank: int = 0) -> nn.Module:
    """One hidden layer, with running statistics that are off, and by more on higher ranks."""
    torch.manual_seed(2)
    bn = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False), bn, nn.ReLU(), nn.Linear(4, 3)).double()
    assert bn.running_mean is not None
    bn.running_mean += 0.2 + 0.1 * rank
    return model


def _examine(dataset: Dataset, model: nn.Module, context: RankContext) -> tuple[Evaluation, Drift]:
    """As rank 0, or alone."""
    first, _, drift = _examine_twice(dataset, model, context)
    assert first is not None
    return first, drift


def _examine_twice(
    dataset: Dataset, model: nn.Module, context: RankContext
) -> tuple[Evaluation | None, Evaluation | None, Drift]:
    """As it is, and with one weight changed."""
    examiner = make_examiner(dataset, context, nullcontext, 8)
    population = examiner.population(model)
    first, drift = examiner.evaluate(model, population, step=5, epoch=2), examiner.drift(model, population, step=5)
    with torch.no_grad():
        next(reversed(list(model.parameters())))[0] += 0.5
    second = examiner.evaluate(model, examiner.population(model), step=6, epoch=2)
    return first, second, drift


def _examine_as_rank(
    dataset: Dataset,
) -> tuple[Evaluation | None, Evaluation | None, Drift, list[Tensor], list[Tensor]]:
    context = _context(dist.get_rank(), dist.get_world_size())
    model = _model(context.rank)
    before = [value.clone() for name, value in model.named_buffers()]
    first, second, drift = _examine_twice(dataset, model, context)
    return first, second, drift, before, [value for name, value in model.named_buffers()]


def _expected(dataset: Dataset) -> dict[str, float]:
    """The whole evaluation once more, by numpy, with the population taken over every training image."""
    model = _model()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    hidden = {
        part: images.numpy().reshape(-1, 6) @ state["1.weight"].T
        for part, images in (("train", dataset.train_images), ("validation", dataset.validation_images))
    }
    labels = dataset.validation_labels.numpy()

    def judge(mean: Any, var: Any, part: str = "validation") -> tuple[Any, Any]:
        truth = labels if part == "validation" else dataset.train_labels.numpy()
        x = np.maximum((hidden[part] - mean) / np.sqrt(var + 1e-5), 0)
        logits = x @ state["4.weight"].T + state["4.bias"]
        loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
        return loss, (logits.argmax(1) == truth).astype(float)

    loss_s, right_s = judge(state["2.running_mean"], state["2.running_var"])
    loss_p, right_p = judge(hidden["train"].mean(0), hidden["train"].var(0, ddof=1))
    loss_t, right_t = judge(hidden["train"].mean(0), hidden["train"].var(0, ddof=1), "train")
    root = np.sqrt(len(labels))
    shift = (state["2.running_mean"] - hidden["train"].mean(0)) / np.sqrt(hidden["train"].var(0) + 1e-5)
    return {
        "stored.loss": loss_s.mean(),
        "stored.accuracy": right_s.mean(),
        "population.loss": loss_p.mean(),
        "population.accuracy": right_p.mean(),
        "loss_damage": (loss_s - loss_p).mean(),
        "loss_damage_se": (loss_s - loss_p).std(ddof=1) / root,
        "accuracy_damage": (right_p - right_s).mean(),
        "accuracy_damage_se": (right_p - right_s).std(ddof=1) / root,
        "train.loss": loss_t.mean(),
        "train.accuracy": right_t.mean(),
        "rms_mean_shift": np.sqrt((shift**2).mean()),
    }


def _found(evaluation: Evaluation, drift: Drift) -> dict[str, float]:
    damages = ("loss_damage", "loss_damage_se", "accuracy_damage", "accuracy_damage_se")
    assert evaluation.train is not None
    return {
        "train.loss": evaluation.train.loss,
        "train.accuracy": evaluation.train.accuracy,
        "stored.loss": evaluation.stored.loss,
        "stored.accuracy": evaluation.stored.accuracy,
        "population.loss": evaluation.population.loss,
        "population.accuracy": evaluation.population.accuracy,
        "rms_mean_shift": drift.layers[0].rms_mean_shift,
        **{name: getattr(evaluation, name) for name in damages},
    }


def test_one_rank_finds_what_numpy_finds() -> None:
    dataset = _dataset(num_train=600)
    evaluation, drift = _examine(dataset, _model(), _context())
    # The shift is defined over the population's variance, biased or not: 1/600 apart at most.
    assert _found(evaluation, drift) == pytest.approx(_expected(dataset), rel=1e-3)
    assert {**_found(evaluation, drift), "rms_mean_shift": 0} == pytest.approx(
        {**_expected(dataset), "rms_mean_shift": 0}, rel=1e-9
    )
    assert (evaluation.step, evaluation.epoch, evaluation.num_images) == (5, 2, 37)
    assert (drift.step, drift.num_population_images) == (5, 600)


def test_ranks_together_find_what_one_rank_finds_with_the_statistics_of_rank_zero() -> None:
    dataset = _dataset()
    alone, alone_after, alone_drift = _examine_twice(dataset, _model(), _context())
    assert alone is not None
    assert alone_after is not None
    (first, second, drift, _, _), *others = together = run_ranks(3, _examine_as_rank, dataset)
    assert [other[:2] for other in others] == [(None, None)] * 2
    assert first is not None
    assert second is not None
    assert _found(first, drift) == pytest.approx(_found(alone, alone_drift), rel=1e-12)
    # The same images in the same order, drawn by the same generator: intervals differ by the rounding of the losses.
    for one, other in ((first, alone), (second, alone_after)):
        assert _ends(one) == pytest.approx(_ends(other), rel=1e-9, abs=1e-15)
        assert _shift(one) == pytest.approx(_shift(other), rel=1e-9)
    assert first.since_best is None
    assert second.since_best is not None
    assert (first.num_images, drift.num_population_images) == (37, 1000)
    for _, _, _, before, after in together:
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def _shift(evaluation: Evaluation) -> dict[str, float]:
    assert evaluation.data_shift is not None
    assert evaluation.data_shift.layer == "2"
    return evaluation.data_shift.model_dump(exclude={"layer"})


def _ends(evaluation: Evaluation) -> list[float]:
    since = evaluation.since_best
    intervals = [
        evaluation.loss_damage_interval,
        evaluation.accuracy_damage_interval,
        *([since.interval] if since else []),
    ]
    return [end for interval in intervals if interval for end in (interval.low, interval.high)]


def test_damages_lie_in_intervals_that_reach_about_two_standard_errors_from_them() -> None:
    evaluation, _ = _examine(_dataset(num_validation=400), _model(), _context())
    loss, accuracy = evaluation.loss_damage_interval, evaluation.accuracy_damage_interval
    assert loss is not None
    assert accuracy is not None
    assert loss.low < evaluation.loss_damage < loss.high
    assert accuracy.low <= evaluation.accuracy_damage <= accuracy.high
    # 2 * 1.96 standard errors for normal values; these are near it, and the draws add 3 %.
    assert loss.high - loss.low == pytest.approx(3.92 * evaluation.loss_damage_se, rel=0.1)
    assert accuracy.high - accuracy.low == pytest.approx(3.92 * evaluation.accuracy_damage_se, rel=0.15)


def test_ranks_with_other_running_statistics_disagree() -> None:
    dataset = _dataset()
    drift = run_ranks(3, _examine_as_rank, dataset)[0][2]
    # Rank 2 is 0.2 off where the stored variance is 1.
    assert drift.layers[0].rank_disagreement == pytest.approx(0.2 / np.sqrt(1 + 1e-5), rel=1e-9)


def test_a_rank_without_images_still_joins_the_exchange() -> None:
    dataset = _dataset(num_train=4, num_validation=2)
    alone, _ = _examine(dataset, _model(), _context())
    evaluation = run_ranks(3, _examine_as_rank, dataset)[0][0]
    assert evaluation is not None
    assert evaluation.num_images == 2
    assert evaluation.stored.loss == pytest.approx(alone.stored.loss, rel=1e-12)
    assert evaluation.train is not None
    assert alone.train is not None
    assert evaluation.train.loss == pytest.approx(alone.train.loss, rel=1e-12)
    assert _shift(evaluation) == pytest.approx(_shift(alone), rel=1e-9)


@pytest.mark.parametrize(("num_train", "expected"), [(2000, 1000), (372, 372), (1, 1)])
def test_the_population_is_the_same_however_many_ranks_there_are(num_train: int, expected: int) -> None:
    dataset = _dataset(num_train)
    alone = make_examiner(dataset, _context(), nullcontext, 8).population_images
    shares = [make_examiner(dataset, _context(rank, 3), nullcontext, 8).population_images for rank in range(3)]
    together = [images for share in shares for images, _ in share.batches]
    assert {share.num_images for share in (alone, *shares)} == {expected} == {len(torch.cat(together))}
    assert all(sum(len(images) for images, _ in share.batches) <= share.most_images for share in shares)
    joined = torch.cat([images for images, _ in alone.batches])
    assert sorted(joined.flatten(1).tolist()) == sorted(torch.cat(together).flatten(1).tolist())


def test_a_model_without_batchnorm_has_no_drift_and_no_damage() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    evaluation, drift = _examine(_dataset(), model, _context())
    assert drift.layers == ()
    assert evaluation.loss_damage == evaluation.loss_damage_se == evaluation.accuracy_damage == 0


def test_a_model_that_gives_no_number_is_judged_all_the_same() -> None:
    model = _model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    evaluation, _ = _examine(_dataset(), model, _context())
    assert np.isnan([evaluation.stored.loss, evaluation.loss_damage, evaluation.loss_damage_se]).all()


def test_training_goes_on_in_the_mode_it_was_in() -> None:
    model = _model().train()
    _examine(_dataset(), model, _context())
    assert all(module.training for module in model.modules())
