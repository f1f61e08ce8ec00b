"""Other data than that of training: found by the first layer; neither chance nor learning by heart passes for it."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.planted_faults.data_sets import digits
from service.jobs import DataShift, Evaluation, JobSpec
from service.training.context import RankContext
from service.training.dataset import Dataset
from service.training.evaluation import make_examiner
from service.training.loop import train
from tests.service.training.runs import of, own_context


def _shift_of(model: nn.Module, train_images: Tensor, validation_images: Tensor) -> DataShift | None:
    """As an evaluation of ``model`` finds it."""
    labels = [torch.zeros(len(images), dtype=torch.int64) for images in (train_images, validation_images)]
    dataset = Dataset(train_images, labels[0], validation_images, labels[1], 3)
    examiner = make_examiner(dataset, RankContext(0, 1, torch.device("cpu"), Path("unused")), nullcontext, 8)
    evaluation = examiner.evaluate(model, examiner.population(model), step=1, epoch=1)
    assert evaluation is not None
    return evaluation.data_shift


def _images(num_images: int, seed: int) -> Tensor:
    return torch.randn(num_images, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _connected() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4)
    return nn.Sequential(*layers).double()


def _convolved() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 3)
    return nn.Sequential(*layers).double()


def test_the_numbers_are_those_of_numpy_and_scipy() -> None:
    train_images, other_images = _images(400, 1), 1.2 * _images(90, 2) + 0.2
    model = _connected()
    found = _shift_of(model, train_images, other_images)
    assert found is not None
    weight = model.get_parameter("1.weight").detach().numpy()
    a, b = (images.flatten(1).numpy() @ weight.T for images in (train_images, other_images))
    shift = (b.mean(0) - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
    ratio = np.log((b.var(0) + 1e-5) / (a.var(0) + 1e-5))
    channel = int(np.abs(shift).argmax())
    expected = {
        "rms_mean_shift": np.sqrt((shift**2).mean()),
        "max_mean_shift": np.abs(shift).max(),
        "max_mean_shift_channel": channel,
        "max_mean_shift_is_higher": shift[channel] > 0,
        "mean_log_var_ratio": ratio.mean(),
        "mean_abs_log_var_ratio": np.abs(ratio).mean(),
        "mean_p": min(1.0, 10 * stats.ttest_ind(a, b, equal_var=False).pvalue.min()),
        "var_p": min(1.0, 10 * _p_of_variances(a, b).min()),
    }
    # The tails of Student's distribution are good to 2e-8; everything else to rounding.
    assert found.layer == "2"
    assert found.model_dump(exclude={"layer", "moved"}) == pytest.approx(expected, rel=1e-6)
    assert found.mean_p < 1
    assert found.var_p < 1


def _p_of_variances(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Welch's test of the logarithm of variances, whose errors come from how squared deviations vary."""
    errors = [((x - x.mean(0)) ** 2).var(0, ddof=1) / len(x) / x.var(0) ** 2 for x in (a, b)]
    total = errors[0] + errors[1]
    degrees = total**2 / (errors[0] ** 2 / (len(a) - 1) + errors[1] ** 2 / (len(b) - 1))
    return np.asarray(2 * stats.t.sf(np.abs(np.log(b.var(0) / a.var(0))) / np.sqrt(total), degrees))


@pytest.mark.parametrize(
    ("scale", "offset", "connected", "convolved"),
    [
        (1.0, 0.0, False, False),
        (1.0, 0.5, True, True),
        (1.5, 0.0, True, True),
        # Of images that were learned by heart, others are but a fainter echo; so they are where weights meet each once.
        (0.6, 0.0, False, True),
    ],
)
def test_what_moves_a_layer_depends_on_whether_it_may_know_its_images_by_heart(
    scale: float, offset: float, connected: bool, convolved: bool
) -> None:
    changed = scale * _images(300, 2) + offset
    for model, moves in ((_connected(), connected), (_convolved(), convolved)):
        found = _shift_of(model, _images(600, 1), changed)
        assert found is not None
        assert found.moved is moves


def test_few_images_prove_nothing_and_without_batchnorm_nothing_tells() -> None:
    few = _shift_of(_connected(), _images(400, 1), _images(31, 2) + 3)
    assert few is not None
    assert few.mean_p < 1e-6
    assert not few.moved
    assert _shift_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), _images(50, 1), _images(50, 2)) is None


@pytest.mark.parametrize("change", ["none", "inverted", "noisy"])
def test_validation_images_of_another_kind_are_told_by_the_first_layer_of_a_job(tmp_path: Path, change: str) -> None:
    clean = digits()
    images = clean.validation_images.astype(np.int64)
    noise = np.random.default_rng(0).integers(-6, 7, images.shape)
    changed = {"none": images, "inverted": 16 - images, "noisy": np.clip(images + noise, 0, 16)}[change]
    data = replace(clean, validation_images=changed.astype(np.uint8)).write(tmp_path / "images")
    spec = JobSpec.model_validate(
        {
            "name": "other images",
            "data": data,
            "model": {"name": "mlp", "hidden_sizes": [32, 32]},
            "num_workers": 1,
            "batch_size_per_worker": 32,
            "max_steps": 40,
            "cadence": {"evaluate_every_steps": 20},
        }
    )
    told = [evaluation.data_shift for evaluation in of(Evaluation, list(train(spec, own_context(tmp_path))))]
    assert [(shift.layer, shift.moved) for shift in told if shift] == [("norm1", change != "none")] * 2
