import numpy as np
import pytest
import torch
from torch import nn

from service.jobs import Mlp, ResNet20
from service.training.models import build_model
from service.training.resnet import BasicBlock


def test_the_mlp_computes_linear_batchnorm_relu_as_numpy_does() -> None:
    torch.manual_seed(1)
    model = build_model(Mlp(hidden_sizes=(5, 4)), (1, 2, 3), num_classes=3, bn_momentum=0.1).double()
    images = torch.randn(7, 1, 2, 3, dtype=torch.float64)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    x = images.numpy().reshape(7, 6)
    for linear, bn in (("linear1", "norm1"), ("linear2", "norm2")):
        x = x @ weights[f"{linear}.weight"].T
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * weights[f"{bn}.weight"] + weights[f"{bn}.bias"]
        x = np.maximum(x, 0)
    expected = x @ weights["classes.weight"].T + weights["classes.bias"]

    np.testing.assert_allclose(model(images).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_resnet20_has_the_parameters_that_its_paper_counts() -> None:
    model = build_model(ResNet20(), (3, 32, 32), num_classes=10, bn_momentum=0.1)
    channels = [(3, 16)] + [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)] + [(64, 64)] * 5
    expected = sum(9 * i * o + 2 * o for i, o in channels) + 64 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected == 269_722  # 0.27 M in table 6
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 20


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_resnet20_takes_images_of_each_data_set(shape: tuple[int, int, int]) -> None:
    model = build_model(ResNet20(width=4), shape, num_classes=7, bn_momentum=0.1)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_shortcut_skips_positions_and_fills_new_channels_with_zeros() -> None:
    block = BasicBlock(2, 3, stride=2, bn_momentum=0.1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2].relu())
    assert torch.equal(y[:, 2], torch.zeros(2, 3, 3))


@pytest.mark.parametrize("model", [Mlp(), ResNet20(width=4)])
def test_every_batchnorm_starts_with_weight_one_and_the_given_momentum(model: Mlp | ResNet20) -> None:
    module = build_model(model, (1, 8, 8), num_classes=10, bn_momentum=0.25)
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(layers) == (3 if isinstance(model, Mlp) else 19)
    assert all(layer.momentum == 0.25 and bool((layer.weight == 1).all()) for layer in layers)


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(ResNet20(width=4), (1, 8, 8), 10, 0.1).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
