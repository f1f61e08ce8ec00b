"""The family of normalizers against plain means and variances in float64, and the way there and back."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.normalizers import (
    ChannelRMSNorm,
    FrozenBatchNorm,
    FrozenNormalizer,
    GhostBatchNorm,
    GhostNormalizer,
    GroupNormalizer,
    InstanceNorm,
    InstanceNormalizer,
    LayerNormalizer,
    Normalizer,
    RMSNormalizer,
    replace_batchnorm,
    restore_batchnorm,
)

BATCHNORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 8), (6, 8, 5), (6, 8, 4, 3), (3, 8, 2, 3, 4)]
ALL: list[Normalizer] = [
    GroupNormalizer(num_groups=4),
    GroupNormalizer(channels_per_group=4),
    LayerNormalizer(),
    InstanceNormalizer(),
    InstanceNormalizer(track_running_stats=True),
    RMSNormalizer(),
    FrozenNormalizer(),
    GhostNormalizer(virtual_batch_size=2),
]
BATCH_INDEPENDENT = ALL[:-1]


def batchnorm(num_dims: int, num_features: int = 8, **options: bool) -> _BatchNorm:
    """A BatchNorm with nothing at its initial value, in float64, training."""
    layer = BATCHNORMS[num_dims](num_features, eps=1e-3, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *(buffer for buffer in layer.buffers() if buffer.is_floating_point())):
            tensor.uniform_(0.5, 2.0)
    return layer


def replaced(num_dims: int, normalizer: Normalizer, num_features: int = 8, **options: bool) -> nn.Module:
    return replace_batchnorm(batchnorm(num_dims, num_features, **options), normalizer)


def batch(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 + 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)


def reckon(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean and biased variance over ``axes``, by sums and counts alone, with the eps of `batchnorm`."""
    count = math.prod(values.shape[axis] for axis in axes)
    mean = values.sum(axes, keepdim=True) / count
    var = ((values - mean) ** 2).sum(axes, keepdim=True) / count
    return (values - mean) / (var + 1e-3) ** 0.5


def by_channel(vector: Tensor | None, num_dims: int) -> Tensor:
    assert vector is not None
    return vector.detach().reshape(1, -1, *[1] * (num_dims - 2))


def spatial(values: Tensor) -> tuple[int, ...]:
    return tuple(range(2, values.dim()))


def reckon_groups(values: Tensor, num_groups: int) -> Tensor:
    grouped = torch.unflatten(values, 1, (num_groups, -1))
    return reckon(grouped, tuple(range(2, grouped.dim()))).flatten(1, 2)


def reckon_rms(values: Tensor) -> Tensor:
    return values / ((values**2).sum(1, keepdim=True) / values.shape[1] + 1e-3) ** 0.5


def reckon_ghosts(values: Tensor, size: int) -> Tensor:
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return torch.cat([reckon(part, (0, *spatial(part))) for part in parts])


RECKONINGS: list[tuple[Normalizer, Callable[[Tensor], Tensor]]] = [
    (GroupNormalizer(num_groups=4), lambda values: reckon_groups(values, 4)),
    (GroupNormalizer(channels_per_group=4), lambda values: reckon_groups(values, 2)),
    (LayerNormalizer(), lambda values: reckon(values, (1, *spatial(values)))),
    (InstanceNormalizer(), lambda values: reckon(values, spatial(values))),
    (InstanceNormalizer(track_running_stats=True), lambda values: reckon(values, spatial(values))),
    (RMSNormalizer(), reckon_rms),
    (GhostNormalizer(virtual_batch_size=2), lambda values: reckon_ghosts(values, 2)),
    (GhostNormalizer(virtual_batch_size=100), lambda values: reckon(values, (0, *spatial(values)))),
]


def channels_of(normalizer: Normalizer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Instance norm has nothing to average for ``(N, C)``; a third dimension is put in."""
    return (*shape, 7) if isinstance(normalizer, InstanceNormalizer) and len(shape) == 2 else shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("normalizer", "expected"), RECKONINGS, ids=[str(case[0]) for case in RECKONINGS])
def test_each_member_is_its_paper_s_formula_over_its_axes(
    normalizer: Normalizer, expected: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    values = batch(*channels_of(normalizer, shape))
    original = batchnorm(values.dim())
    layer = replace_batchnorm(original, normalizer)
    reckoned = expected(values) * by_channel(original.weight, values.dim())
    if not isinstance(normalizer, RMSNormalizer):
        reckoned = reckoned + by_channel(original.bias, values.dim())
    torch.testing.assert_close(layer(values), reckoned, rtol=0, atol=1e-12)
    single = layer.float()(values.float())
    torch.testing.assert_close(single.double(), reckoned, rtol=0, atol=2e-5)


@pytest.mark.parametrize("normalizer", ALL, ids=str)
def test_a_batch_of_nothing_passes_with_gradients_of_zero(normalizer: Normalizer) -> None:
    layer = replaced(4, normalizer)
    before = copy.deepcopy(dict(layer.named_buffers()))
    nothing = torch.empty(0, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    if isinstance(normalizer, GhostNormalizer):  # in training it counts a batch, as BatchNorm does
        layer.eval()
    output = layer(nothing)
    output.sum().backward()
    assert output.shape == nothing.shape
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in layer.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("normalizer", ALL, ids=str)
def test_without_weight_and_bias_the_member_has_none_either(normalizer: Normalizer) -> None:
    layer = replaced(4, normalizer, affine=False)
    assert "weight" not in layer.state_dict()
    assert "bias" not in layer.state_dict()
    assert layer(batch(6, 8, 4, 3)).isfinite().all()


def test_one_group_is_layer_norm_over_channels_and_positions() -> None:
    values = batch(6, 8, 4, 3)
    plain = nn.LayerNorm((8, 4, 3), eps=1e-3, elementwise_affine=False)(values)
    for normalizer in (GroupNormalizer(num_groups=1), LayerNormalizer()):
        torch.testing.assert_close(replaced(4, normalizer, affine=False)(values), plain, rtol=0, atol=1e-13)
    # With weight and bias torch's learns one for each element; equal ones within a channel make it ours.
    original = batchnorm(4)
    torchs = nn.LayerNorm((8, 4, 3), eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        torchs.weight.copy_(by_channel(original.weight, 4)[0].expand(8, 4, 3))
        torchs.bias.copy_(by_channel(original.bias, 4)[0].expand(8, 4, 3))
    torch.testing.assert_close(
        replace_batchnorm(original, LayerNormalizer())(values), torchs(values), rtol=0, atol=1e-12
    )


def test_layer_norm_takes_batches_of_any_size_and_number_of_positions() -> None:
    layer = replaced(4, LayerNormalizer())
    assert [layer(batch(2, 8, size, size + 1)).shape[-1] for size in (1, 5, 9)] == [2, 6, 10]


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_as_many_groups_as_channels_are_instance_norm(shape: tuple[int, ...]) -> None:
    values = batch(*shape)
    instances = replaced(len(shape), InstanceNormalizer(), affine=False)
    groups = replaced(len(shape), GroupNormalizer(num_groups=8), affine=False)
    torchs = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[len(shape)](8, eps=1e-3)
    assert torch.equal(instances(values), torchs(values))
    torch.testing.assert_close(groups(values), torchs(values), rtol=0, atol=1e-12)


def test_instance_norm_refuses_channels_that_are_single_values() -> None:
    # torch's InstanceNorm1d takes the square (8, 8) for one sample of 8 channels and normalizes over features.
    with pytest.raises(ValueError, match="single value"):
        replaced(2, InstanceNormalizer())(batch(8, 8))
    with pytest.raises(ValueError, match="expected 8 channels"):
        replaced(3, InstanceNormalizer())(batch(8, 6, 8))


def test_instance_norm_with_statistics_tracks_each_sample_s_own_and_uses_them_in_evaluation() -> None:
    values, original = batch(6, 8, 4, 3), batchnorm(4)
    layer = replace_batchnorm(original, InstanceNormalizer(track_running_stats=True))
    assert isinstance(layer, InstanceNorm)
    layer(values)
    flat = values.flatten(2)
    mean = flat.mean(2).mean(0)
    var = ((flat - flat.mean(2, keepdim=True)) ** 2).sum(2).div(11).mean(0)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var, rtol=0, atol=1e-13)
    reckoned = (values - by_channel(0.1 * mean, 4)) / (by_channel(0.9 + 0.1 * var, 4) + 1e-3).sqrt()
    reckoned = reckoned * by_channel(original.weight, 4) + by_channel(original.bias, 4)
    torch.testing.assert_close(layer.eval()(values), reckoned, rtol=0, atol=1e-12)


def test_rms_norm_is_torch_s_over_channels_and_subtracts_no_mean() -> None:
    values = batch(6, 8)
    layer = replaced(2, RMSNormalizer())
    assert isinstance(layer, ChannelRMSNorm)
    torchs = nn.RMSNorm(8, eps=1e-3, dtype=torch.float64)
    torchs._parameters["weight"] = layer.weight
    assert torch.equal(layer(values), torchs(values))
    # A constant input is all mean: LayerNorm makes nothing of it, RMSNorm ones.
    constant = torch.full((1, 8), 5.0, dtype=torch.float64)
    plain = replaced(2, RMSNormalizer(), affine=False)(constant)
    torch.testing.assert_close(plain, torch.ones_like(constant), rtol=0, atol=1e-4)
    assert replaced(2, LayerNormalizer(), affine=False)(constant).abs().max() == 0.0
    # At a position the values of other positions do not count.
    images = batch(2, 8, 4, 3)
    changed = images.clone()
    changed[..., 1:, :] = 7.0
    layer = replaced(4, RMSNormalizer())
    assert torch.equal(layer(images)[..., :1, :], layer(changed)[..., :1, :])


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=12)
@given(
    choice=st.integers(0, len(BATCH_INDEPENDENT) - 1),
    num_samples=st.integers(1, 5),
    positions=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_sample_does_not_feel_its_batch_mates(
    training: bool, choice: int, num_samples: int, positions: list[int], seed: int, scale: float
) -> None:
    sample = batch(1, 8, *positions, seed=seed)
    layer = replaced(sample.dim(), BATCH_INDEPENDENT[choice]).train(training)
    mates = [scale * batch(num_samples, 8, *positions, seed=seed + k) for k in (1, 2)]
    # Equal to the bit beside mates of one number; a different number may round in another order.
    first, second = (copy.deepcopy(layer)(torch.cat([sample, mate]))[:1] for mate in mates)
    assert torch.equal(first, second)
    torch.testing.assert_close(copy.deepcopy(layer)(sample), first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), GhostBatchNorm(8, virtual_batch_size=2)], ids=["batch", "ghost"])
def test_a_sample_feels_its_batch_mates_in_training_and_not_in_evaluation(layer: nn.Module) -> None:
    layer = layer.double()
    sample, mates = batch(1, 8, 4, 3), batch(1, 8, 4, 3, seed=1)
    together, moved = torch.cat([sample, mates]), torch.cat([sample, mates + 1.0])
    assert (layer(together)[0] - layer(moved)[0]).abs().max() > 0.1
    layer.eval()
    assert torch.equal(layer(together)[0], layer(moved)[0])


def test_frozen_is_one_affine_map_in_every_mode_and_never_changes() -> None:
    original = batchnorm(4)
    layer = replace_batchnorm(original, FrozenNormalizer())
    assert isinstance(layer, FrozenBatchNorm)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    scale = before["weight"] / (before["running_var"] + 1e-3).sqrt()
    shift = before["bias"] - before["running_mean"] * scale
    values = batch(6, 8, 4, 3).requires_grad_()
    for mode in (True, False):
        output = layer.train(mode)(values)
        torch.testing.assert_close(output, by_channel(scale, 4) * values + by_channel(shift, 4), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(output.sum(), values)
    torch.testing.assert_close(gradient, by_channel(scale, 4).expand_as(values), rtol=0, atol=1e-12)
    assert list(layer.requires_grad_().parameters()) == []
    assert layer.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_frozen_stays_where_an_optimizer_that_still_holds_the_weights_moves_them() -> None:
    original = batchnorm(2)
    optimizer = torch.optim.SGD(original.parameters(), lr=1.0, weight_decay=0.5)
    weight = original.weight.detach().clone()
    original(batch(6, 8)).sum().backward()
    layer = replace_batchnorm(original, FrozenNormalizer())
    optimizer.step()
    assert torch.equal(layer.state_dict()["weight"], weight)
    assert restore_batchnorm(layer) is original
    assert torch.equal(original.weight, weight)
    assert original.weight.requires_grad


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_ghost_batches_are_separate_batchnorms_one_after_another(size: int, momentum: float | None) -> None:
    values = batch(12, 8, 4, 3).requires_grad_()
    torchs = batchnorm(4)
    torchs.momentum = momentum
    layer = replace_batchnorm(copy.deepcopy(torchs), GhostNormalizer(size))
    upstream = batch(12, 8, 4, 3, seed=9)
    expected = torch.cat([torchs(part) for part in torch.split(values, size)])  # 5, 5 and 2 of 12
    output = layer(values)
    assert torch.equal(output, expected)
    got = torch.autograd.grad(output, [values, *layer.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [values, *torchs.parameters()], upstream)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for name, tensor in torchs.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_one_ghost_of_the_whole_batch_is_batchnorm() -> None:
    values, torchs = batch(12, 8), batchnorm(2)
    layer = replace_batchnorm(copy.deepcopy(torchs), GhostNormalizer(12))
    assert torch.equal(layer(values), torchs(values))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in torchs.state_dict().items())
    assert torch.equal(layer.eval()(values), torchs.eval()(values))


def test_a_ghost_of_a_single_value_is_refused_before_any_statistic_moves() -> None:
    layer = replaced(2, GhostNormalizer(4))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"batch of 9 in virtual batches of 4 .* single value"):
        layer(batch(9, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert replaced(4, GhostNormalizer(4))(batch(9, 8, 2, 2)).shape == (9, 8, 2, 2)


class SharedNet(nn.Module):
    """A layer in two places, a nested one, one without weight, and layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), self.first, nn.ReLU(), nn.BatchNorm2d(8, affine=False))
        self.last = SyncBatchNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.last(self.block(self.first(images)))
        return result


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_any_number_of_swaps_comes_back_to_the_same_modules_and_bits() -> None:
    model = SharedNet()
    model(torch.randn(4, 8, 3, 3))
    model.first.weight.requires_grad_(False)
    model.block[3].eval()
    modules, tensors = dict(model.named_modules()), tensors_of(model)
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for normalizer in (*ALL, *reversed(ALL)):
        assert replace_batchnorm(model, normalizer) is model
        assert model.first is model.block[1]
        if not isinstance(normalizer, FrozenNormalizer):
            assert model.first.weight is tensors["first.weight"]
            assert not model.first.weight.requires_grad
        assert [model.first.training, model.block[3].training] == [True, False]
        assert not any(type(module) in (nn.BatchNorm2d, SyncBatchNorm) for module in model.modules())
    assert restore_batchnorm(model) is model
    assert dict(model.named_modules()) == modules
    assert [module.training for module in modules.values()] == [path != "block.3" for path in modules]
    for name, tensor in tensors_of(model).items():
        assert tensor is tensors[name], name
        assert tensor.data_ptr() == pointers[name]
        assert torch.equal(tensor, values[name])
    assert model.last.weight.requires_grad
    assert restore_batchnorm(model) is model


@pytest.mark.parametrize("normalizer", ALL, ids=str)
def test_replacing_keeps_type_and_the_optimizer_s_parameters(normalizer: Normalizer) -> None:
    model = SharedNet().double()
    known = {id(parameter) for parameter in model.parameters()}
    replace_batchnorm(model, normalizer)
    assert {id(parameter) for parameter in model.parameters()} <= known
    assert all(tensor.dtype is torch.float64 for tensor in tensors_of(model).values() if tensor.is_floating_point())
    assert model(torch.randn(6, 8, 3, 3, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("normalizer", ALL, ids=str)
def test_a_model_cast_between_the_swaps_comes_back_cast(normalizer: Normalizer) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    originals = dict(model.named_modules())
    restore_batchnorm(replace_batchnorm(model, normalizer).double().eval())
    assert dict(model.named_modules()) == originals
    assert not model[1].training
    assert all(tensor.dtype is torch.float64 for tensor in tensors_of(model).values() if tensor.is_floating_point())
    assert model(batch(2, 8, 3, 3)).dtype is torch.float64


@pytest.mark.parametrize("affine", [True, False])
def test_what_ghosts_learned_is_the_batchnorm_s_when_it_returns(affine: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(8, affine=affine))
    twin = copy.deepcopy(model).double()
    # The cast gives the ghosts new buffers, which the BatchNorm has never seen.
    replace_batchnorm(model, GhostNormalizer(4)).double()(batch(8, 8))
    restore_batchnorm(model)
    for part in torch.split(batch(8, 8), 4):
        twin(part)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("normalizer", ALL[:-2], ids=str)
def test_what_was_put_into_the_stand_in_is_the_batchnorm_s_when_it_returns(normalizer: Normalizer) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8))
    saved = {
        name: torch.full_like(value, 3.0) for name, value in replace_batchnorm(model, normalizer).state_dict().items()
    }
    model.load_state_dict(saved, assign=True)  # other tensors in the place of those that both shared
    parameters = dict(model.named_parameters())
    restore_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_a_copy_and_a_saved_file_of_a_replaced_model_can_be_restored() -> None:
    model = SharedNet()
    replace_batchnorm(model, GroupNormalizer(num_groups=2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(other, SharedNet)
        weight = other.first.weight
        assert weight is not model.first.weight
        restore_batchnorm(other)
        assert isinstance(other.first, nn.BatchNorm2d)
        assert other.first is other.block[1]
        assert other.first.weight is weight
    assert isinstance(model.first, nn.GroupNorm)


def test_a_model_that_is_one_batchnorm_is_answered_with_another_module() -> None:
    layer = nn.BatchNorm2d(8)
    groups = replace_batchnorm(layer, GroupNormalizer(num_groups=2))
    assert isinstance(groups, nn.GroupNorm)
    assert restore_batchnorm(groups) is layer


def test_only_the_named_types_return_when_asked_so() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8)))
    replace_batchnorm(model, GroupNormalizer(num_groups=2))
    replace_batchnorm(model[1], FrozenNormalizer())
    restore_batchnorm(model, only=(FrozenBatchNorm,))
    assert [type(model.get_submodule(path)) for path in ("0", "1.0")] == [nn.GroupNorm, nn.BatchNorm2d]


def test_a_converted_model_stays_converted() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))
    restore_batchnorm(replace_batchnorm(model, LayerNormalizer()))
    assert isinstance(model.get_submodule("0"), SyncBatchNorm)


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (
            GroupNormalizer(num_groups=8),
            r"1\.norm has 12 channels, which num_groups=8 .* nearest num_groups .*: 6 or 12",
        ),
        (GroupNormalizer(num_groups=32), r"1\.norm has 12 channels, which num_groups=32 .*: 12$"),
        (GroupNormalizer(channels_per_group=5), r"1\.norm has 12 channels, which channels_per_group=5 .*: 4 or 6"),
        (InstanceNormalizer(track_running_stats=True), r"1\.norm has momentum=None"),
        (FrozenNormalizer(), r"1\.norm keeps no running statistics"),
    ],
    ids=str,
)
def test_what_cannot_be_built_names_path_and_remedy_and_changes_nothing(normalizer: Normalizer, message: str) -> None:
    inner = nn.Sequential()
    inner.add_module("norm", nn.BatchNorm2d(12, momentum=None, track_running_stats=False))
    model = nn.Sequential(nn.BatchNorm2d(32 * 8 * 5), inner)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_batchnorm(model, normalizer)
    assert dict(model.named_modules()) == before


class FusedBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_batchnorm_that_would_lose_something_is_refused() -> None:
    parametrized = nn.BatchNorm2d(8)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    for layer, message in [
        (FusedBatchNorm(8), "0 is a FusedBatchNorm with a forward of its own"),
        (nn.LazyBatchNorm2d(), "0 is a LazyBatchNorm2d that has no size yet"),
        (parametrized, "0 has parametrized tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace_batchnorm(nn.Sequential(layer), LayerNormalizer())


def test_impossible_specs_are_refused_where_they_are_made() -> None:
    with pytest.raises(ValueError, match="one of num_groups and channels_per_group"):
        GroupNormalizer()
    with pytest.raises(ValueError, match="one of num_groups and channels_per_group"):
        GroupNormalizer(num_groups=2, channels_per_group=2)
    with pytest.raises(ValueError, match="at least 1"):
        GroupNormalizer(num_groups=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GhostNormalizer(0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GhostBatchNorm(8, 0)
