"""What is foretold of running statistics, against a network whose weights stand still."""

import math
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.drift import ImageMoments, design_effect
from syncbn.history import StatisticsHistory
from syncbn.outlook import Risk, foresee, typical_design_effect

MOMENTUM, BATCH, STEPS = 0.3, 8, 1500


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(8, momentum=MOMENTUM), nn.BatchNorm2d(8, momentum=MOMENTUM)
    last = nn.Linear(32, 16), nn.BatchNorm1d(16, momentum=MOMENTUM)
    convs = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU(), nn.Flatten(), *last)


def _population(model: nn.Module, images: Tensor) -> dict[str, ImageMoments]:
    moments: dict[str, ImageMoments] = {}

    def note(path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments[path] = ImageMoments.of(args[0])

    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    handles = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers.items()]
    model(images)
    for handle in handles:
        handle.remove()
    return moments


@torch.no_grad()
def test_the_noise_of_a_network_that_stands_still_is_as_foretold() -> None:
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    model = _network()
    population = _population(model, images)
    history, generator = StatisticsHistory(model, STEPS), torch.Generator().manual_seed(1)
    means: dict[str, list[Tensor]] = {path: [] for path in population}
    for _ in range(STEPS):
        model(images[torch.randint(len(images), (BATCH,), generator=generator)])
        history.record()
        for path, seen in means.items():
            seen.append(model.get_buffer(f"{path}.running_mean").double().clone())
    ratios = []
    for path, moments in population.items():
        measured = torch.stack(means[path][50:]).std(0) / moments.var.sqrt()
        foretold = [
            foresee(BATCH, int(moments.positions), MOMENTUM, STEPS, effect).running_mean_noise
            for effect in design_effect(moments).tolist()
        ]
        ratios.append(float(measured.square().mean().sqrt() / torch.tensor(foretold).square().mean().sqrt()))
    first, *deeper = ratios
    assert first == pytest.approx(1.0, abs=0.1)  # 0.03 of it is chance
    # What is fed to these was normalized by the same batch, which takes away some of what batches differ in.
    assert all(0.75 < ratio < 1.05 for ratio in deeper), ratios


def test_every_number_follows_its_formula() -> None:
    outlook = foresee(num_images=4, positions=49, momentum=0.2, num_steps=7, design_effect=3.0)
    assert outlook.batch_mean_error == pytest.approx(math.sqrt(3 / (4 * 49)), rel=1e-12)
    share = sum((0.2 * 0.8**k) ** 2 for k in range(7))  # of the variance of one batch's mean
    assert outlook.running_mean_noise == pytest.approx(math.sqrt(3 / (4 * 49) * share), rel=1e-12)
    assert outlook.var_bias == pytest.approx(-2 / 195, rel=1e-12)
    assert outlook.lag_steps == pytest.approx(4.0, rel=1e-12)
    assert outlook.initial_weight == pytest.approx(0.8**7, rel=1e-12)
    assert (1 - outlook.grown_momentum) ** 7 == pytest.approx(0.01, rel=1e-12)
    assert typical_design_effect(1) == 1.0  # a fully connected layer has no more than one value an image
    assert math.isnan(foresee(1, 1, 0.1, 10).var_bias)


@pytest.mark.parametrize(("num_images", "momentum"), [(2, 0.5), (1, 0.9), (2, 0.3)])
def test_the_remedies_are_just_enough(num_images: int, momentum: float) -> None:
    steps = 10_000
    outlook = foresee(num_images, 1, momentum, steps)
    assert outlook.risks == (Risk.NOISY,)
    assert foresee(num_images, 1, outlook.quiet_momentum, steps).running_mean_noise == pytest.approx(0.2, rel=1e-9)
    assert not foresee(outlook.quiet_images, 1, momentum, steps).risks
    assert foresee(outlook.quiet_images - 1, 1, momentum, steps).risks


def test_a_short_run_with_a_small_momentum_is_young_and_not_noisy() -> None:
    outlook = foresee(num_images=32, positions=1, momentum=0.001, num_steps=500)
    assert outlook.risks == (Risk.YOUNG,)
    assert outlook.initial_weight == pytest.approx(0.6064, abs=1e-4)
    assert not foresee(32, 1, outlook.grown_momentum, 500).risks
    assert foresee(32, 1, 0.1, 500).risks == ()


def test_what_no_training_could_have_is_refused() -> None:
    for images, positions, momentum, steps in ((0, 1, 0.1, 1), (1, 0, 0.1, 1), (1, 1, 0.1, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            foresee(images, positions, momentum, steps)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        foresee(1, 1, 0.0, 1)
    with pytest.raises(ValueError, match="0 or more"):
        foresee(1, 1, 0.1, 1, design_effect=-1.0)
