from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncbn
from service.jobs import ModeFault, ModeFaultKind
from service.training.modes import ModeWatch
from service.training.resnet import ResNet20


class StuckInTraining(nn.BatchNorm2d):
    """Somebody's layer that does not listen when it is told to evaluate."""

    def train(self, mode: bool = True) -> "StuckInTraining":
        return super().train(True)


def _model(norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(3, 2, 3), norm(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten())


def _images(size: int = 10) -> torch.Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def _step(model: nn.Module) -> None:
    model(_images())


def _look(watch: ModeWatch, model: nn.Module, step: int) -> list[ModeFault]:
    faults = list(watch.in_training(step))
    with watch.during_evaluation(step, faults):
        was_training = model.training
        model.eval()(_images())
        model.train(was_training)
    return faults + list(watch.in_evaluation(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [_model, lambda: ResNet20(1, 10, 4, 0.1)], ids=["small", "resnet20"])
def test_a_sound_model_is_never_accused(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = build().to(dtype)
    images = torch.randn(10, 1, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    watch = ModeWatch(model, images)
    for step in range(1, 6):
        model(images * step)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        faults = [*watch.in_training(step), *watch.in_evaluation(step)]
        assert faults == []
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_layer_that_goes_by_the_batch_in_evaluation_is_named() -> None:
    model = _model(StuckInTraining)
    watch = ModeWatch(model, _images())
    _step(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (fault,) = watch.in_evaluation(4)
    assert (fault.kind, fault.layer, fault.step) == (ModeFaultKind.BATCH_IN_EVALUATION, "2.1", 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_that_move_in_evaluation_are_named() -> None:
    model = _model(StuckInTraining)
    watch = ModeWatch(model, _images())
    _step(model)
    moved, by_batch = _look(watch, model, 1)
    assert (moved.kind, moved.layer) == (ModeFaultKind.MOVED_IN_EVALUATION, "2.1")
    assert by_batch.kind is ModeFaultKind.BATCH_IN_EVALUATION


def test_a_model_left_in_evaluation_mode_is_told_until_it_trains() -> None:
    model = _model()
    watch = ModeWatch(model, _images())
    _step(model)
    assert _look(watch, model, 1) == []
    model.eval()
    _step(model)
    (fault,) = _look(watch, model, 2)
    assert (fault.kind, fault.layer) == (ModeFaultKind.FROZEN_IN_TRAINING, "0.1")
    assert "and 1 more" in fault.detail
    model.train()
    _step(model)
    assert _look(watch, model, 3) == []


def test_layers_that_are_frozen_on_purpose_are_at_no_fault() -> None:
    model = syncbn.freeze(_model())
    watch = ModeWatch(model, _images())
    _step(model)
    assert _look(watch, model, 1) == []


def test_a_model_that_has_diverged_is_at_no_fault() -> None:
    model = _model()
    watch = ModeWatch(model, _images())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    _step(model)
    assert _look(watch, model, 1) == []
