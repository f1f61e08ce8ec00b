"""Other data than that of training: the first layer that moves, and none where only chance differs."""

import torch
from torch import Tensor, nn

from syncbn import population_statistics
from syncbn.drift import ImageMoments, first_moved, image_moments, measure_shift


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).eval()


def _images(seed: int) -> Tensor:
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _seen(model: nn.Module, images: Tensor) -> dict[str, ImageMoments]:
    with image_moments(model) as seen, torch.no_grad():
        for batch in torch.split(images, 100):
            model(batch)
    return seen


def test_moments_by_image_are_those_of_every_input_of_a_layer() -> None:
    model = _model()
    x = _images(1)
    with image_moments(model) as seen:
        population = population_statistics(model, torch.split(x, 100))
    assert list(seen) == ["0", "2", "5"]
    for path, moments in population.items():
        torch.testing.assert_close(seen[path].mean, moments.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen[path].var, moments.var, rtol=1e-5, atol=1e-6)
    images = dict(seen)
    model(x)
    assert {path: images[path] is seen[path] for path in seen} == dict.fromkeys(seen, True)  # no hook is left


def test_brighter_images_move_the_first_layer_and_other_features_a_later_one() -> None:
    model, train = _model(), _images(1)
    reference = _seen(model, train)
    same = measure_shift(reference, _seen(model, _images(2)))
    assert first_moved(same) is None
    assert [shift.layer for shift in same] == ["0", "2", "5"]
    brighter = measure_shift(reference, _seen(model, _images(2) + 0.5))
    moved = first_moved(brighter)
    assert moved is not None
    assert moved.layer == "0"
    assert abs(moved.rms_mean_shift - 0.5) < 0.02  # five standard errors of one channel
    # Equal rows: each channel's own values are as before, and what a convolution makes of them is not.
    flat = _images(2)[:, :, :1].expand(-1, -1, 8, -1)
    features = first_moved(measure_shift(reference, _seen(model, flat)))
    assert features is not None
    assert features.layer == "2"


def test_too_few_images_prove_nothing() -> None:
    reference, other = ImageMoments.of(torch.randn(50, 4)), ImageMoments.of(torch.randn(1, 4) + 9)
    (shift,) = measure_shift({"a": reference}, {"a": other, "b": other})
    assert shift.p == 1
    assert not shift.moved()
