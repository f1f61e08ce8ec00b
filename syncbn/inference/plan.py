"""Which BatchNorm can be folded into which layer, and why others cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.batchnorm import SyncBatchNorm
from syncbn.freezing import is_frozen, unfreeze_layer
from syncbn.inference.calls import Call, Calls
from syncbn.layers import input_of_call, unwrapped
from syncbn.normalizers.frozen import FrozenBatchNorm
from syncbn.normalizers.ghost import GhostBatchNorm
from syncbn.normalizers.swap import restore_batchnorm

Norm = _BatchNorm | FrozenBatchNorm
"""What is one affine map per channel in evaluation, if it keeps running statistics."""


@dataclass(frozen=True)
class FoldingPlan:
    """What `fold_batchnorm` does with each BatchNorm of a model, by module path.

    ``folded``: the BatchNorm, and the linear or convolution layer that takes it in.
    ``left``: the BatchNorm, and why it stays one.
    """

    folded: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        folded = [f"{batchnorm} folded into {layer}" for batchnorm, layer in self.folded.items()]
        return "\n".join(folded + [f"{batchnorm} left: {reason}" for batchnorm, reason in self.left.items()])


def plan_folding(model: nn.Module, example_input: Any = None) -> FoldingPlan:
    """What `fold_batchnorm` would do, which changes nothing.

    Folded is a BatchNorm (torch's, ours, ghost or frozen) with running statistics that takes all its input from one
    Linear, Conv1d to 3d or ConvTranspose1d to 3d, which gives its output to nothing else; each is called once, holds no
    hooks and no parametrizations, and no other code reads its tensors. This is read off the graph that
    `torch.fx` traces from ``forward``. Of a model that it cannot trace, the largest submodules that it can are read,
    on the assumption that the rest of the model calls them as a whole.

    Args:
        model: in any mode, on any device.
        example_input: what the model is called with, a tuple for several arguments. It is run once, in evaluation
            mode, and shows how many dimensions each BatchNorm is given, and which of those that cannot be traced is
            given a mask. Without, a Linear followed by a BatchNorm
            is taken to see ``(N, C)``; in ``(N, L, C)`` with as many positions ``L`` as channels, BatchNorm would
            normalize positions, and only an example can tell.
    """
    return plan_for(serving_copy(model), example_input)


def serving_copy(model: nn.Module) -> nn.Module:
    """In evaluation mode, not frozen, and with BatchNorms where ghost or frozen ones stand in: the same map."""
    copied = restore_batchnorm(copy.deepcopy(unwrapped(model)), only=(FrozenBatchNorm, GhostBatchNorm))
    for module in copied.modules():
        if is_frozen(module):
            unfreeze_layer(module)
    return copied.eval()


_FORWARDS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    SyncBatchNorm.forward,
    GhostBatchNorm.forward,
    FrozenBatchNorm.forward,
)

CALLED_WITH_A_MASK = "it is called with a mask, by which positions are zeroed"
"""Why a layer is left that must remain a SyncBatchNorm: torch's takes no mask."""

# How many dimensions the output of a layer has that keeps its channels in dimension 1.
_OUTPUT_DIMS: Mapping[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}

# What torch's classes take; the others take any.
_INPUT_DIMS: Mapping[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


@dataclass(frozen=True)
class _Example:
    """What BatchNorms were called with: inputs of how many dimensions, and which of them with a mask."""

    num_dims: dict[nn.Module, set[int]] = field(default_factory=dict)
    masked: set[nn.Module] = field(default_factory=set)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call; a forward pre-hook."""
        values, mask = input_of_call(args, kwargs)
        self.num_dims.setdefault(module, set()).add(values.dim())
        if mask is not None:
            self.masked.add(module)


def plan_for(model: nn.Module, example_input: Any) -> FoldingPlan:
    """The plan for a `serving_copy`, which keeps no more of the example than a call in evaluation leaves."""
    example = _run(model, example_input)
    calls = Calls(model, (_BatchNorm, FrozenBatchNorm, *_OUTPUT_DIMS))
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, norm in model.named_modules():
        if isinstance(norm, Norm):
            found = _layer_for(norm, calls, example)
            if isinstance(found, str):
                left[path] = found
            else:
                folded[path] = found.path
    return FoldingPlan(folded, left)


def _layer_for(norm: Norm, calls: Calls, example: _Example) -> Call | str:
    """The call of the layer that can take ``norm`` in, or why there is none."""
    if type(norm).forward not in _FORWARDS:
        return f"{type(norm).__name__} has a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, and normalizes by each batch"
    own = calls.of(norm)
    if norm in example.masked or any(len(call.node.all_input_nodes) > 1 for call in own):
        return CALLED_WITH_A_MASK
    if not own:
        return _why_not_called(calls)
    layer = calls.behind(own[0].node)
    reason = calls.why_not_alone(norm)
    if reason is not None:
        return f"it {reason}"
    if layer is None or not isinstance(layer.module, tuple(_OUTPUT_DIMS)):
        return "its input is not the output of a linear or convolution layer"
    if len(layer.node.users) > 1:
        return f"{layer.path} gives its output to others as well"
    reason = calls.why_not_alone(layer.module)
    if reason is not None:
        return f"{layer.path} {reason}"
    if type(layer.module) not in _OUTPUT_DIMS:
        return f"{layer.path} is a {type(layer.module).__name__}, which may do more than torch's layer"
    fits = _fits(layer.module, norm, example.num_dims.get(norm, set()))
    return layer if fits else f"its channels are not those of {layer.path}"


def _why_not_called(calls: Calls) -> str:
    if calls.trace_error is None:
        return "no forward that was traced calls it"
    error = str(calls.trace_error).partition("\n")[0]
    return f"it is called by code that torch.fx cannot trace ({type(calls.trace_error).__name__}: {error})"


def _fits(layer: nn.Module, norm: Norm, num_dims: set[int]) -> bool:
    """Whether the channels that ``norm`` knows by dimension 1 are the outputs of ``layer``."""
    expected = _OUTPUT_DIMS[type(layer)]
    num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(num_outputs, int)
    takes = _INPUT_DIMS.get(type(norm), (expected,))
    return num_outputs == norm.num_features and expected in takes and num_dims <= {expected}


@torch.no_grad()
def _run(model: nn.Module, example_input: Any) -> _Example:
    """What each BatchNorm was called with when ``model`` ran the example; nothing is known without one."""
    seen = _Example()
    if example_input is None:
        return seen
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Norm):
                handle = module.register_forward_pre_hook(seen.note, with_kwargs=True)
                stack.callback(handle.remove)
        model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    return seen
