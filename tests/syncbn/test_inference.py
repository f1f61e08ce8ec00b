"""Folded models against the same models in evaluation, and which layers may not be folded."""

import copy
import logging
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, is_frozen
from syncbn.inference import fold_batchnorm, plan_folding
from syncbn.normalizers import (
    FrozenNormalizer,
    GhostNormalizer,
    GroupNormalizer,
    LayerNormalizer,
    replace_batchnorm,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def trained(model: nn.Module, seed: int = 0, var_scale: float = 1.0) -> nn.Module:
    """The model with statistics, weights and biases of its BatchNorms away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_var is not None and module.running_mean is not None:
                    module.running_var.uniform_(0.5, 2.0, generator=generator).mul_(var_scale)
                    module.running_mean.normal_(generator=generator)
                for parameter in module.parameters():
                    parameter.uniform_(-1.5, 1.5, generator=generator)
    return model


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def assert_same(folded: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """Outputs agree within 1e-5 (float32) or 1e-12 (float64), of the largest output where that exceeds 1."""
    expected = copy.deepcopy(model).eval()(*inputs)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(folded(*inputs), expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


def norms_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@settings(deadline=None, max_examples=60)
@given(
    num_spatial=st.integers(0, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    affine=st.booleans(),
    var_scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e4]),
    synchronized=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_a_pair_of_any_kind_folds_into_one_layer(
    num_spatial: int,
    transposed: bool,
    groups: int,
    stride: int,
    padding: int,
    bias: bool,
    affine: bool,
    var_scale: float,
    synchronized: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer: nn.Module
    if num_spatial == 0:
        layer = nn.Linear(8, 12, bias=bias)
    else:
        kind = (TRANSPOSED if transposed else CONVS)[num_spatial]
        layer = kind(8, 12, 3, stride=stride, padding=padding, groups=groups, bias=bias)
    model = trained(nn.Sequential(layer, NORMS[num_spatial](12, affine=affine)), seed, var_scale).to(dtype)
    if synchronized:
        convert_sync_batchnorm(model)
    folded = fold_batchnorm(model)
    assert [type(module) for module in folded.children()] == [type(layer), nn.Identity]
    assert_same(folded, model, batch(4, 8, *[5] * num_spatial, seed=seed, dtype=dtype))


def test_where_torch_s_own_fusion_serves_the_weights_are_the_same() -> None:
    cases: list[tuple[nn.Module, nn.Module, Any]] = [
        (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), fuse_conv_bn_eval),
        (nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8), partial(fuse_conv_bn_eval, transpose=True)),
        (nn.Linear(4, 8), nn.BatchNorm1d(8), fuse_linear_bn_eval),
    ]
    for layer, norm, fuse in cases:
        model = trained(nn.Sequential(layer, norm)).double().eval()
        expected = fuse(model.get_submodule("0"), model.get_submodule("1"))
        folded = fold_batchnorm(model).get_submodule("0")
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=0, atol=1e-14)


class Block(nn.Module):
    """A residual block, the sum after the second BatchNorm."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


class ResidualNet(nn.Module):
    """Twenty layers in three stages, as ResNet-20 for CIFAR."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        for stage in range(3):
            for index in range(3):
                stride = 2 if stage > 0 and index == 0 else 1
                num_out = width * 2**stage
                blocks.append(Block(num_out // stride, num_out, stride))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn(self.stem(images))))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_residual_net_folds_whole_and_answers_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ResidualNet().to(dtype)
    for seed in range(3):
        model(batch(16, 3, 16, 16, seed=seed, dtype=dtype))
    plan = plan_folding(model)
    assert plan.left == {}
    assert len(plan.folded) == 21
    assert plan.folded["blocks.3.shortcut.1"] == "blocks.3.shortcut.0"
    assert plan.folded["blocks.0.bn2"] == "blocks.0.conv2"
    folded = fold_batchnorm(model)
    assert type(folded) is ResidualNet
    assert norms_of(folded) == []
    images = batch(16, 3, 16, 16, seed=9, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images)
        assert (folded(images) - expected).abs().max() < TOLERANCE[dtype]


def test_the_exported_program_of_a_folded_model_gives_the_same_output() -> None:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(trained(ResidualNet()))
    folded = fold_batchnorm(model)
    images = batch(2, 3, 16, 16, dtype=torch.float32)
    exported = torch.export.export(folded, (images,))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        assert torch.equal(exported.module()(images), folded(images))
    assert_same(folded, model, images)


def test_the_original_keeps_mode_tensors_and_hooks() -> None:
    model = ResidualNet()
    trained(model)
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, modes = dict(model.named_modules()), [module.training for module in model.modules()]
    folded = fold_batchnorm(model, batch(2, 3, 8, 8, dtype=torch.float32))
    assert dict(model.named_modules()) == modules
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module.training for module in folded.modules())
    assert {tensor.data_ptr() for tensor in folded.parameters()}.isdisjoint(
        tensor.data_ptr() for tensor in model.parameters()
    )


class Branching(nn.Module):
    """One pair that folds, beside every sort of pair that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.seen = nn.Conv2d(8, 8, 1)
        self.seen_bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.twice_bn = nn.BatchNorm2d(8)
        self.shared_conv = nn.Conv2d(8, 8, 1)
        self.shared_bn = nn.BatchNorm2d(8)
        self.hooked = nn.Conv2d(8, 8, 1)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.hooked_bn = nn.BatchNorm2d(8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.normed_bn = nn.BatchNorm2d(8)
        self.read = nn.Conv2d(8, 8, 1)
        self.read_bn = nn.BatchNorm2d(8)
        self.own = OwnConv(8, 8, 1)
        self.own_bn = nn.BatchNorm2d(8)
        self.untracked = nn.Conv2d(8, 8, 1)
        self.untracked_bn = nn.BatchNorm2d(8, track_running_stats=False)
        self.pre_bn = nn.BatchNorm2d(8)
        self.unused_bn = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.good(images)
        seen = self.seen(x)
        x = self.seen_bn(seen) + seen.relu()
        x = self.twice_bn(self.twice(self.twice(x)))
        x = self.shared_bn(self.shared_bn(self.shared_conv(x)))
        x = self.hooked_bn(self.hooked(x))
        x = self.normed_bn(self.normed(x))
        x = self.read_bn(self.read(x)) + self.read.weight.mean()
        x = self.own_bn(self.own(x))
        x = self.untracked_bn(self.untracked(x))
        result: Tensor = self.pre_bn(x.relu())
        return result


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_what_may_not_be_folded_is_left_with_its_reason_and_the_output_is_right() -> None:
    torch.manual_seed(0)
    model = trained(Branching()).double()
    plan = plan_folding(model)
    assert plan.folded == {"good.1": "good.0"}
    assert plan.left == {
        "seen_bn": "seen gives its output to others as well",
        "twice_bn": "twice is called 2 times",
        "shared_bn": "it is called 2 times",
        "hooked_bn": "hooked has forward hooks",
        "normed_bn": "normed has parametrized tensors",
        "read_bn": "read has tensors that other code reads",
        "own_bn": "own is a OwnConv, which may do more than torch's layer",
        "untracked_bn": "it keeps no running statistics, and normalizes by each batch",
        "pre_bn": "its input is not the output of a linear or convolution layer",
        "unused_bn": "no forward that was traced calls it",
    }
    assert "good.1 folded into good.0" in str(plan)
    assert "own_bn left: own is a OwnConv" in str(plan)
    folded = fold_batchnorm(model)
    assert norms_of(folded) == list(plan.left)
    assert_same(folded, model, batch(4, 3, 5, 5))


class FusedBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_batchnorm_with_a_forward_of_its_own_stays() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), FusedBatchNorm(8)))
    assert plan_folding(model).left == {"1": "FusedBatchNorm has a forward of its own"}
    assert_same(fold_batchnorm(model), model, batch(4, 3, 5, 5, dtype=torch.float32))


class Wandering(nn.Module):
    """A forward that no tracer follows, around parts that can be traced; one of them stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Block(3, 8, 2), Block(8, 8, 1)])
        self.stem_bn = nn.BatchNorm2d(3)
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.again = self.tail

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.stem_bn(images)
        for stage in self.stages:
            x = stage(x)
        if x.sum() > 0:
            x = self.tail(x)
        return self.again(x) if len(x) > 1 else x


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_of_a_model_that_cannot_be_traced_the_parts_that_can_be_are_folded(sign: float) -> None:
    torch.manual_seed(0)
    model = trained(Wandering())
    plan = plan_folding(model)
    assert plan.folded == {
        f"stages.{stage}.{batchnorm}": f"stages.{stage}.{layer}"
        for stage in (0, 1)
        for batchnorm, layer in [("bn1", "conv1"), ("bn2", "conv2"), ("shortcut.1", "shortcut.0")]
        if stage == 0 or batchnorm != "shortcut.1"
    }
    assert plan.left["stem_bn"].startswith("it is called by code that torch.fx cannot trace (TraceError: ")
    assert plan.left["tail.1"] == "it stands in 2 places"
    assert_same(fold_batchnorm(model), model, sign * batch(4, 3, 8, 8, dtype=torch.float32))


def test_only_an_example_shows_that_a_linear_s_outputs_are_not_the_channels() -> None:
    # (N, L, C) with L = C: BatchNorm normalizes positions, which the size alone does not tell.
    model = trained(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))).double()
    tokens = batch(4, 8, 3)
    plan = plan_folding(model, tokens)
    assert plan.left == {"1": "its channels are not those of 0"}
    assert_same(fold_batchnorm(model, tokens), model, tokens)
    assert plan_folding(model, batch(4, 3)).folded == {"1": "0"}
    assert plan_folding(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(5))).folded == {}
    assert plan_folding(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm2d(8))).folded == {}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 1)
        self.bn = SyncBatchNorm(8)
        self.left_bn = SyncBatchNorm(8)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        result: Tensor = self.left_bn(self.bn(input=self.conv(one)) + other)
        return result


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 1)
        self.bn = SyncBatchNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.bn(self.conv(tokens), mask=tokens[:, 0] != 0)
        return result


class Untraceable(Padded):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) if tokens.sum() > 0 else tokens


@pytest.mark.parametrize("kind", [Padded, Untraceable])
def test_a_batchnorm_that_is_called_with_a_mask_stays_ours(kind: type[nn.Module]) -> None:
    model, tokens = trained(kind()).double(), batch(2, 3, 5).abs()
    tokens[1, :, 2:] = 0.0
    assert plan_folding(model, tokens).left == {"bn": "it is called with a mask, by which positions are zeroed"}
    assert_same(fold_batchnorm(model, tokens), model, tokens)


def test_nothing_of_this_library_is_left_in_the_folded_model() -> None:
    model = trained(TwoInputs()).double()
    inputs = (batch(4, 3, 5), batch(4, 8, 5, seed=1))
    folded = fold_batchnorm(model, inputs)
    assert [type(module) for module in folded.children()] == [nn.Conv1d, nn.Identity, nn.BatchNorm1d]
    assert_same(folded, model, *inputs)
    assert [type(module) for module in model.children()] == [nn.Conv1d, SyncBatchNorm, SyncBatchNorm]
    assert b"syncbn" not in pickle.dumps(list(folded.children()))


@pytest.mark.parametrize("normalizer", [FrozenNormalizer(), GhostNormalizer(2)], ids=["frozen", "ghost"])
def test_frozen_and_ghost_batchnorms_fold_like_those_they_stand_in_for(normalizer: Any) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))).double()
    replace_batchnorm(model, normalizer)
    folded = fold_batchnorm(model)
    assert [type(module) for module in folded.children()] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d]
    assert_same(folded, model, batch(4, 3, 5, 5))


def test_a_frozen_model_folds_and_stays_frozen_itself() -> None:
    model = freeze(trained(nn.Sequential(nn.Conv2d(3, 8, 1), SyncBatchNorm(8), nn.ReLU(), nn.BatchNorm2d(8))).double())
    folded = fold_batchnorm(model)
    assert [type(module) for module in folded.children()] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d]
    assert b"syncbn" not in pickle.dumps(folded)
    assert_same(folded, model, batch(4, 3, 5, 5))
    assert [is_frozen(module) for module in model.children()] == [False, True, False, True]


@pytest.mark.parametrize("normalizer", [FrozenNormalizer(), GhostNormalizer(2)], ids=["frozen", "ghost"])
def test_frozen_and_ghost_batchnorms_built_by_hand_fold_too(normalizer: Any) -> None:
    layer = normalizer.build("", trained(nn.BatchNorm2d(8)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer).double()
    assert plan_folding(model).folded == {"1": "0"}
    assert_same(fold_batchnorm(model), model, batch(4, 3, 5, 5))


@pytest.mark.parametrize("normalizer", [GroupNormalizer(num_groups=2), LayerNormalizer()], ids=["group", "layer"])
def test_norms_of_each_sample_are_no_affine_map_and_stay(normalizer: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).double()
    replace_batchnorm(model, normalizer)
    folded = fold_batchnorm(model)
    assert isinstance(folded.get_submodule("1"), nn.GroupNorm)
    assert b"syncbn" not in pickle.dumps(folded)
    assert_same(folded, model, batch(4, 3, 5, 5))


def test_folding_keeps_requires_grad_and_breaks_ties_of_weights_only_in_the_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    first, last = model.get_submodule("0"), model.get_submodule("3")
    last.weight = first.weight
    first.weight.requires_grad_(False)
    trained(model)
    folded = fold_batchnorm(model)
    assert not folded.get_submodule("0").weight.requires_grad
    assert last.weight is first.weight
    assert_same(folded, model, batch(4, 8, dtype=torch.float32))


def test_half_precision_weights_are_folded_exactly_and_rounded_once() -> None:
    model = trained(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).bfloat16()
    exact = fold_batchnorm(copy.deepcopy(model).double())
    for name, tensor in fold_batchnorm(model).state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].bfloat16()), name


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="syncbn.inference"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    assert "1 folded into 0" in caplog.text
    assert "2 left: its input is not the output" in caplog.text


def test_a_model_that_is_itself_a_batchnorm_has_nothing_to_fold_into() -> None:
    model = trained(nn.BatchNorm1d(8))
    assert plan_folding(model).folded == {}
    assert_same(fold_batchnorm(model), model, batch(4, 8, dtype=torch.float32))
