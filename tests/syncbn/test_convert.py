"""Conversion to SyncBatchNorm and back: nothing is lost, and what would be lost is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from tests.ranks import run_ranks


class Labelled(nn.BatchNorm2d):
    """A subclass that adds what is no forward, and overrides what is none."""

    label = "stem"

    def train(self, mode: bool = True) -> Labelled:
        return super().train(mode and self.label == "stem")


class LabelledSync(nn.SyncBatchNorm):
    """Of torch's synchronized class, whose own forward refuses the CPU."""

    label = "stem"


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def _model() -> nn.Sequential:
    shared = nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Conv2d(2, 3, 1),
        shared,
        nn.Sequential(nn.BatchNorm3d(4, eps=1e-2, momentum=None), nn.BatchNorm1d(5, affine=False)),
        shared,
        nn.SyncBatchNorm(6),
        Labelled(7),
        nn.GroupNorm(1, 3),
    )


def test_every_batchnorm_is_converted_and_comes_back_as_it_was() -> None:
    model = _model()
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    attributes = [dict(vars(module)) for module in modules]
    assert convert_sync_batchnorm(model) is model
    synced = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    assert len(synced) == 5
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert revert_sync_batchnorm(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())


def test_conversion_keeps_parameters_hooks_flags_and_attributes() -> None:
    layer = nn.BatchNorm2d(3).eval()
    layer.weight.requires_grad_(False)
    vars(layer)["origin"] = "stem"
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    tensors = [*layer.parameters(), *layer.buffers()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    converted = convert_sync_batchnorm(nn.Sequential(layer))[0]  # type: ignore[index]
    assert isinstance(converted, SyncBatchNorm)
    assert all(a is b for a, b in zip([*converted.parameters(), *converted.buffers()], tensors, strict=True))
    assert not converted.training
    assert not converted.weight.requires_grad
    assert vars(converted)["origin"] == "stem"
    assert optimizer.param_groups[0]["params"][1] is converted.bias
    converted(torch.randn(2, 3, 4, 4))
    assert calls == ["called"]


def test_a_shared_layer_stays_one_layer() -> None:
    model = _model()
    convert_sync_batchnorm(model)
    assert model[1] is model[3]


def test_a_layer_that_is_the_whole_model_is_converted() -> None:
    layer = nn.BatchNorm1d(3)
    assert convert_sync_batchnorm(layer) is layer
    assert isinstance(layer, SyncBatchNorm)


def test_converting_again_changes_nothing() -> None:
    model = convert_sync_batchnorm(_model())
    before = [dict(vars(module)) for module in model.modules()]
    convert_sync_batchnorm(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    revert_sync_batchnorm(revert_sync_batchnorm(model))
    assert isinstance(model.get_submodule("2.0"), nn.BatchNorm3d)


def test_a_copy_of_a_converted_model_reverts_too() -> None:
    copied = revert_sync_batchnorm(copy.deepcopy(convert_sync_batchnorm(_model())))
    assert type(copied.get_submodule("5")) is Labelled


def test_a_subclass_with_its_own_forward_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Activated(3)))
    with pytest.raises(ValueError, match=r"1\.0 is a Activated with a forward of its own"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_what_a_subclass_adds_and_overrides_is_there_in_between(tmp_path: Path) -> None:
    model = nn.Sequential(Labelled(3), nn.Sequential(Labelled(3), weight_norm(LabelledSync(3))))
    layers = [module for module in convert_sync_batchnorm(model).modules() if isinstance(module, SyncBatchNorm)]
    assert [getattr(layer, "label", None) for layer in layers] == ["stem"] * 3
    assert isinstance(layers[0], Labelled)
    assert type(layers[0]) is type(layers[1])
    layers[0].label = "head"
    model.train()
    assert [layer.training for layer in layers] == [False, True, True]
    model(torch.randn(4, 3, 2, 2))
    assert [int(layer.num_batches_tracked or 0) for layer in layers] == [0, 1, 1]
    torch.save(layers[0], tmp_path / "layer.pt")
    copies = [copy.copy(layers[0]), copy.deepcopy(layers[0]), torch.load(tmp_path / "layer.pt", weights_only=False)]
    for copied in copies:
        assert type(copied) is type(layers[0])
        assert not copied.train().training
        assert type(revert_sync_batchnorm(copied)) is Labelled
    classes = [type(layer).__mro__[:2] for layer in revert_sync_batchnorm(model).modules() if hasattr(layer, "label")]
    assert [names[0] for names in classes[:2]] == [Labelled] * 2
    assert classes[2][1] is LabelledSync  # behind the class of its parametrization


def test_a_subclass_of_ours_stays_what_it_is() -> None:
    class Own(SyncBatchNorm):
        def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(input, mask).relu()

    layer = Own(3)
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        assert type(change(layer)) is Own


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_layer_compiled_by_torchscript_is_refused_by_path() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))
    with pytest.raises(ValueError, match=r"1\.0 is a BatchNorm2d compiled by torch\.jit\.script"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_lazy_layer_is_refused_by_path() -> None:
    with pytest.raises(ValueError, match="0 is a LazyBatchNorm2d that has no size yet"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))


def test_a_parametrized_layer_keeps_its_parametrizations_there_and_back() -> None:
    layer = weight_norm(nn.BatchNorm1d(3, dtype=torch.float64))
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    parameters = dict(layer.named_parameters())
    convert_sync_batchnorm(layer)
    assert isinstance(layer, SyncBatchNorm)
    assert layer.weight is not layer.weight  # computed each time
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=1e-12, atol=1e-12)
    revert_sync_batchnorm(layer)
    assert isinstance(layer, nn.BatchNorm1d)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=1e-12, atol=1e-12)
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    remove_parametrizations(layer, "weight")
    assert type(layer) is nn.BatchNorm1d


def test_parametrizations_may_come_and_go_between_conversion_and_way_back() -> None:
    came = convert_sync_batchnorm(nn.BatchNorm1d(3))
    went = convert_sync_batchnorm(weight_norm(nn.BatchNorm1d(3)))
    weight_norm(came)
    remove_parametrizations(went, "weight")
    revert_sync_batchnorm(nn.ModuleList([came, went]))
    assert is_parametrized(came, "weight")
    assert isinstance(came, nn.BatchNorm1d)
    assert type(went) is nn.BatchNorm1d
    x = torch.randn(4, 3)
    torch.testing.assert_close(copy.deepcopy(came)(x), went(x))


def test_every_kind_of_hook_is_called_before_between_and_after() -> None:
    layer = nn.BatchNorm1d(3)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before forward"))
    layer.register_forward_hook(lambda *_: calls.append("after forward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    layer.register_full_backward_hook(lambda *_: calls.append("after backward"))
    layer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))  # type: ignore[no-untyped-call]
    layer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))  # type: ignore[no-untyped-call]
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        change(layer)
        calls.clear()
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
        layer.load_state_dict(layer.state_dict())
        times = [f"{when} {what}" for what in ("forward", "backward", "saving", "loading") for when in _WHEN]
        assert calls == times


_WHEN = ("before", "after")


def test_torchs_own_spelling_converts_too() -> None:
    model = _model()
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 5


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2, 3), nn.BatchNorm1d),
        ((2, 3, 4), nn.BatchNorm1d),
        ((2, 3, 4, 4), nn.BatchNorm2d),
        ((2, 3, 4, 4, 4), nn.BatchNorm3d),
    ],
)
def test_a_layer_built_synchronized_reverts_to_what_fits_its_inputs(shape: tuple[int, ...], kind: type) -> None:
    layer = SyncBatchNorm(3)
    x = torch.randn(shape)
    layer.eval()
    expected = layer(x)
    revert_sync_batchnorm(layer)
    assert type(layer) is kind
    assert torch.equal(layer(x), expected)
    assert vars(layer).keys() == vars(kind(3)).keys()


def test_a_layer_built_synchronized_that_saw_nothing_reverts_to_two_dimensions() -> None:
    assert type(revert_sync_batchnorm(SyncBatchNorm(3))) is nn.BatchNorm2d


def test_every_nested_layer_gets_the_group() -> None:
    assert run_ranks(2, _convert_with_group) == [True, True]


def _convert_with_group() -> bool:
    group = dist.new_group([0, 1])
    model = convert_sync_batchnorm(_model(), group)
    groups = [module.process_group for module in model.modules() if isinstance(module, SyncBatchNorm)]
    convert_sync_batchnorm(model)
    return len(groups) == 5 and all(one is group for one in groups)
