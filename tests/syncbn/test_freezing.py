"""Frozen layers: nothing about them changes, nothing is sent, and all is as it was afterwards."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from syncbn import (
    SyncBatchNorm,
    apply_statistics,
    convert_sync_batchnorm,
    freeze,
    is_frozen,
    population_statistics,
    revert_sync_batchnorm,
    unfreeze,
    using_statistics,
)
from syncbn.normalizers import FrozenNormalizer, replace_batchnorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog


class Activated(nn.BatchNorm1d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def _model() -> nn.Sequential:
    torch.manual_seed(8)
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        SyncBatchNorm(4, momentum=None),
        nn.Sequential(Activated(4)),
        nn.Linear(4, 2),
    )
    model(torch.randn(8, 3) * 3 + 1)
    return model


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | SyncBatchNorm)]


def _train(model: nn.Module, num_steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(num_steps):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()


def test_training_moves_everything_but_the_frozen_layers() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    assert freeze(model) is model
    _train(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_a_gradient_at_hand_when_a_layer_is_frozen_moves_it_no_more() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    freeze(model)
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"0.weight", "4.weight", "4.bias"} <= moved  # a bias before a BatchNorm has a gradient of about zero
    assert not any(name.startswith(("1.", "2.", "3.")) for name in moved)


def test_in_every_mode_a_frozen_layer_computes_what_it_computes_in_evaluation() -> None:
    model = _model()
    x = torch.randn(6, 3)
    expected = copy.deepcopy(model).eval()(x)
    freeze(model)
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x), expected)
    lone = torch.randn(1, 3)
    assert torch.equal(model.train()(lone), model.eval()(lone))


def test_unfreezing_restores_every_flag_and_attribute() -> None:
    model = _model()
    model[1].eval()
    model[2].weight.requires_grad_(False)
    attributes = [dict(vars(module)) for module in model.modules()]
    asking = [parameter.requires_grad for parameter in model.parameters()]
    unfreeze(freeze(freeze(model)))
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert not any(is_frozen(module) for module in model.modules())


@pytest.mark.parametrize("modes", [(), (True,), (False,), (False, True), (True, False)], ids=str)
def test_unfreezing_gives_the_mode_that_was_last_asked_for(modes: tuple[bool, ...]) -> None:
    model, thawed = _model(), _model()
    freeze(thawed)
    for mode in modes:
        model.train(mode)
        thawed.train(mode)
        assert not any(module.training for module in _norms(thawed))
    unfreeze(thawed)
    assert [module.training for module in thawed.modules()] == [module.training for module in model.modules()]


def test_after_unfreezing_it_trains_as_if_never_frozen() -> None:
    model, thawed = _model(), _model()
    unfreeze(freeze(thawed))
    for one in (model, thawed):
        torch.manual_seed(1)
        _train(one)
    for name, value in model.state_dict().items():
        assert torch.equal(thawed.state_dict()[name], value)


def test_a_part_may_be_frozen_and_a_part_unfrozen() -> None:
    model = _model()
    freeze(model[3])
    assert [is_frozen(module) for module in _norms(model)] == [False, False, True]
    freeze(model)
    unfreeze(model[1])
    assert [is_frozen(module) for module in _norms(model)] == [False, True, True]


def test_layers_that_share_a_parameter_give_it_back_its_flag() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    unfreeze(freeze(model))
    assert model[0].weight.requires_grad


def test_parametrized_layers_are_frozen_with_what_they_are_computed_from() -> None:
    layer = weight_norm(nn.BatchNorm1d(3))
    freeze(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_frozen_layer_is_frozen_by_itself(how: str) -> None:
    layer = freeze(SyncBatchNorm(4))
    copied: nn.Module = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert is_frozen(copied)
    copied.eval()
    unfreeze(copied)
    assert not copied.training
    assert all(parameter.requires_grad for parameter in copied.parameters())
    assert is_frozen(layer)
    assert unfreeze(layer).training


def test_frozen_layers_stay_frozen_through_conversion_and_replacement() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    layer = freeze(model)[0]  # type: ignore[index]
    convert_sync_batchnorm(model)
    assert is_frozen(layer)
    model.train()
    assert not layer.training
    revert_sync_batchnorm(model)
    assert unfreeze(layer).training
    assert type(layer) is nn.BatchNorm1d
    freeze(model)
    expected = model(torch.ones(2, 3))
    replace_batchnorm(model, FrozenNormalizer())
    assert torch.equal(model.train()(torch.ones(2, 3)), expected)


def test_population_statistics_of_a_frozen_model_leave_it_frozen() -> None:
    model, batches = freeze(_model()), [torch.randn(5, 3), torch.randn(2, 3) + 1]
    population = population_statistics(model, batches)
    assert all(is_frozen(module) for module in _norms(model))
    assert not any(module.training for module in _norms(model))
    before = copy.deepcopy(model.state_dict())
    apply_statistics(model, population)
    with using_statistics(model, population):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert unfreeze(model).state_dict().keys() == before.keys()
    assert all(module.training for module in _norms(model))


def test_behind_a_frozen_layer_the_population_is_what_that_layer_puts_out() -> None:
    model = _model().double()
    batches = [torch.randn(size, 3, dtype=torch.float64) * 2 + 1 for size in (5, 2, 7)]
    freeze(model[1])
    population = population_statistics(model, batches)
    with torch.no_grad():  # the frozen layer is the same affine map for every batch, so all batches may be joined
        fed = model[1](model[0](torch.cat(batches))).numpy()
    np.testing.assert_allclose(population["2"].mean.numpy(), fed.mean(0), rtol=1e-10)
    np.testing.assert_allclose(population["2"].unbiased_var.numpy(), fed.var(0, ddof=1), rtol=1e-10)
    apply_statistics(model, population)
    np.testing.assert_allclose(model.get_buffer("2.running_mean").numpy(), fed.mean(0), rtol=1e-10)


def test_layers_that_cannot_be_frozen_are_named_before_anything_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(ValueError, match=r"1\.0 keeps no running statistics"):
        freeze(model)
    for refused in (freeze, lambda lazy: population_statistics(lazy, [torch.ones(2, 3)])):
        with pytest.raises(ValueError, match="0 is a LazyBatchNorm1d that has no size yet"):
            refused(nn.Sequential(nn.LazyBatchNorm1d()))
    assert not is_frozen(model[0])
    assert model[0].training


def test_frozen_layers_do_not_communicate_and_wrapped_models_train_around_them() -> None:
    for num_collectives, same in run_ranks(2, _train_frozen):
        assert num_collectives == 0
        assert same


def _train_frozen() -> tuple[int, bool]:
    layer = freeze(SyncBatchNorm(3)).train()
    with CollectiveLog() as log:
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    model = convert_sync_batchnorm(_model()[0:2])
    _refuse(freeze, DistributedDataParallel(model))
    freeze(model)
    before = copy.deepcopy(model[1].state_dict())  # type: ignore[index]
    wrapped = DistributedDataParallel(model)
    _refuse(unfreeze, wrapped)
    _train(wrapped)
    return len(log.collectives), all(torch.equal(model[1].state_dict()[name], value) for name, value in before.items())  # type: ignore[index]


def _refuse(change: Callable[[nn.Module], nn.Module], wrapped: DistributedDataParallel) -> None:
    """The wrapper would wait for gradients that do not come, or leave out those that do."""
    frozen = is_frozen(wrapped.module[1])
    with pytest.raises(ValueError, match=r"^1 is in DistributedDataParallel.* wrap that anew"):
        change(nn.Sequential(wrapped))
    assert is_frozen(wrapped.module[1]) is frozen
