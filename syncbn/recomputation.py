"""Activation checkpointing seen from inside a layer: is this forward a recomputation, and of what.

A forward that runs inside a backward pass recomputes an earlier one, which has counted already. What belongs to the
checkpointed segment can hold the exchanged statistics until then: the frame of a non-reentrant
`torch.utils.checkpoint`, the context of a reentrant one. Which that is, torch tells nobody: the frame is read off the
hooks by which torch saves tensors for it, the context off the stack. Where these look otherwise than expected, nothing
is remembered, and a recomputation exchanges its statistics again, as all ranks do alike.
"""

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from syncbn.moments import BatchMoments

_MOMENTS = "_syncbn_moments"
_NUM_RECALLED = "_syncbn_num_recalled"
_FIRST_RUN = CheckpointFunction.forward.__code__
_RECOMPUTATION = CheckpointFunction.backward.__code__


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("syncbn::none_if_recomputing", mutates_args=())
def none_if_recomputing(count: Tensor) -> Tensor:
    """``count`` in a first run, 0 in a recomputation: for compiled code, which only learns when it runs what it is."""
    return torch.zeros_like(count) if is_recomputing() else count.clone()


@none_if_recomputing.register_fake
def _(count: Tensor) -> Tensor:
    return torch.empty_like(count)


def remember(moments: BatchMoments) -> None:
    """Keep ``moments`` for the recomputation of the segments that are running, for as long as it may come."""
    if torch.compiler.is_compiling():
        return
    frame = _variables_of_saving().get("frame")
    # Of a non-reentrant segment inside a reentrant one the first run has no frame, as it needs no gradient, but the
    # second has: the reentrant one is to hold whatever runs in it, so that it is counted alike both times.
    for segment in [*([] if frame is None else [frame]), *_reentrant_first_runs()]:
        segment.__dict__.setdefault(_MOMENTS, []).append(moments)


def recall() -> BatchMoments | None:
    """What the first run remembered at this place of the segment; None if this recomputes nothing that remembered."""
    if not is_recomputing():
        return None
    segment = _recomputed_segment()
    if segment is None or _MOMENTS not in segment.__dict__:
        return None
    # A graph that is kept may be run backward several times, each a recomputation from the start.
    num_recalled: dict[int, int] = segment.__dict__.setdefault(_NUM_RECALLED, {})
    backward = torch._C._current_graph_task_id()
    place = num_recalled.get(backward, 0)
    num_recalled[backward] = place + 1
    moments: BatchMoments = getattr(segment, _MOMENTS)[place]
    return moments


def _recomputed_segment() -> Any:
    """What stands for the innermost segment that is being recomputed, if it is known."""
    variables = _variables_of_saving()
    if "target_frame_ref" in variables:
        return variables["target_frame_ref"]()
    return next((segment for code, segment in _reentrant_segments() if code is _RECOMPUTATION), None)


def _reentrant_first_runs() -> Iterator[Any]:
    """Of the reentrant segments around this forward those that run for the first time, as far as torch knows."""
    for code, segment in _reentrant_segments():
        if code is _RECOMPUTATION:
            return
        yield segment


def _reentrant_segments() -> Iterator[tuple[Any, Any]]:
    """Which function of each reentrant checkpoint around this forward is running, and its context; innermost first."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _FIRST_RUN or frame.f_code is _RECOMPUTATION:
            yield frame.f_code, frame.f_locals["ctx"]


def _variables_of_saving() -> dict[str, Any]:
    """What the function that saves tensors at the moment has closed over; nothing where tensors are just kept."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return {}
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    if not isinstance(pack, FunctionType):
        return {}
    return dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
