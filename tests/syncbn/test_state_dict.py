"""State dicts, copies and pickles: what is saved from one BatchNorm loads into another."""

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from tests.ranks import run_ranks

SHAPES: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, (6, 4)),
    (nn.BatchNorm2d, (6, 4, 3, 3)),
    (nn.BatchNorm3d, (6, 4, 2, 3, 2)),
    (nn.SyncBatchNorm, (6, 4, 3)),
]
KINDS = pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=[kind.__name__ for kind, _ in SHAPES])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}],
    ids=["all", "not-affine", "untracked", "nothing"],
)


def _trained(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """After two batches in eager mode, with weights that are not ones."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        if not isinstance(layer, nn.SyncBatchNorm):  # which trains on GPUs only
            for _ in range(2):
                layer(torch.randn(shape, generator=generator) * 2 + 1)
    return layer


@KINDS
@OPTIONS
def test_what_torch_saves_ours_loads_and_back(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    theirs = _trained(kind(4, **options), shape)
    ours = SyncBatchNorm(4, **options)
    assert str(ours.load_state_dict(theirs.state_dict(), strict=True)) == "<All keys matched successfully>"
    x = torch.randn(shape)
    if not isinstance(theirs, nn.SyncBatchNorm) or theirs.running_mean is not None:
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    _trained(ours.train(), shape)
    again = kind(4, **options)
    again.load_state_dict(ours.state_dict(), strict=True)
    _assert_equal(again.state_dict(), ours.state_dict())


def _assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_checkpoint_from_before_batches_were_counted_loads() -> None:
    layer = _trained(nn.BatchNorm2d(4), (2, 4, 3, 3))
    old: OrderedDict[str, Tensor] = OrderedDict(layer.state_dict())
    del old["num_batches_tracked"]
    for metadata in (None, {"": {"version": 1}}):
        if metadata is not None:
            old._metadata = metadata  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
        ours = SyncBatchNorm(4)
        ours.load_state_dict(old, strict=True)
        assert ours.num_batches_tracked == 0
        assert torch.equal(ours.running_var, layer.state_dict()["running_var"])  # type: ignore[arg-type]


def test_a_checkpoint_of_now_without_the_count_is_refused() -> None:
    state = SyncBatchNorm(4).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        SyncBatchNorm(4).load_state_dict(state, strict=True)


def test_a_converted_models_checkpoint_is_the_models() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    _trained(model, (3, 2, 4, 4))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert_sync_batchnorm(model)
    _assert_equal(converted.state_dict(), saved)
    converted.load_state_dict(saved, strict=True)


@pytest.mark.parametrize("copied", ["copy", "deepcopy", "pickle", "torch"])
def test_a_copy_computes_the_same_and_of_a_deep_one_nothing_is_shared(copied: str) -> None:
    layer = _trained(convert_sync_batchnorm(nn.BatchNorm2d(4, eps=1e-3, momentum=None)), (3, 4, 2, 2))
    replica = _copied(layer, copied)
    assert type(replica) is SyncBatchNorm
    assert vars(replica).keys() == vars(layer).keys()
    assert (replica.eps, replica.momentum, replica.training) == (1e-3, None, True)
    _assert_equal(replica.state_dict(), layer.state_dict())
    for theirs, ours in zip(replica.state_dict().values(), layer.state_dict().values(), strict=True):
        assert (theirs.data_ptr() == ours.data_ptr()) is (copied == "copy")


def test_a_layer_with_a_group_of_its_own_is_copied_with_it_and_pickling_says_what_to_do() -> None:
    for message in run_ranks(2, _copy_with_group):
        assert message.startswith("cannot pickle the SyncBatchNorm '0': its process group is a connection")
        assert "save model.state_dict() instead, or set the layer's process_group to None" in message


def _copy_with_group() -> str:
    group = dist.new_group([0, 1])
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2), weight_norm(nn.BatchNorm1d(2))), group)
    layer = model.get_submodule("0")
    for replica in (copy.deepcopy(model), copy.copy(model), nn.Sequential(copy.copy(layer))):
        assert all(layer.process_group is group for layer in replica)  # type: ignore[attr-defined]
    SyncBatchNorm(2, process_group=group).load_state_dict(layer.state_dict())
    with pytest.raises(TypeError) as error:
        torch.save(model, io.BytesIO())
    # The default group is what a layer without one uses, here as where it is loaded.
    for default in (dist.group.WORLD, None):
        convert_sync_batchnorm(layer, default)
        loaded = pickle.loads(pickle.dumps(layer))
        assert loaded.process_group is None
        assert vars(loaded).keys() == vars(layer).keys()
    return str(error.value)


def _copied(layer: nn.Module, how: str) -> nn.Module:
    if how in ("copy", "deepcopy"):
        replica: nn.Module = getattr(copy, how)(layer)
        return replica
    stream = io.BytesIO()
    if how == "pickle":
        pickle.dump(layer, stream)
        stream.seek(0)
        replica = pickle.load(stream)
        return replica
    torch.save(layer, stream)
    stream.seek(0)
    replica = torch.load(stream, weights_only=False)
    return replica
