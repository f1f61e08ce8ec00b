"""Activation checkpointing seen from inside a layer: is this forward a recomputation, and of what.

A forward that runs inside a backward pass recomputes an earlier one, which has counted already. Non-reentrant
`torch.utils.checkpoint` gives each checkpointed segment a frame, in which the exchanged statistics can wait for the
recomputation. Which frame that is, torch tells nobody: it is read off the hooks by which torch saves tensors for it.
Where they look otherwise than expected, nothing is remembered, and a recomputation exchanges its statistics again, as
all ranks do alike.
"""

from types import FunctionType
from typing import Any

import torch

from syncbn.moments import BatchMoments

_MOMENTS = "_syncbn_moments"
_NUM_RECALLED = "_syncbn_num_recalled"


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remember(moments: BatchMoments) -> None:
    """Keep ``moments`` for the recomputation of the segment that is running, for as long as it may come."""
    frame = _variables_of_saving().get("frame")
    if frame is not None:
        frame.__dict__.setdefault(_MOMENTS, []).append(moments)


def recall() -> BatchMoments | None:
    """What the first run remembered at this place of the segment; None if this recomputes nothing that remembered."""
    if not is_recomputing():
        return None
    reference = _variables_of_saving().get("target_frame_ref")
    frame = None if reference is None else reference()
    if frame is None or _MOMENTS not in frame.__dict__:
        return None
    # A graph that is kept may be run backward several times, each a recomputation from the start.
    num_recalled: dict[int, int] = frame.__dict__.setdefault(_NUM_RECALLED, {})
    backward = torch._C._current_graph_task_id()
    place = num_recalled.get(backward, 0)
    num_recalled[backward] = place + 1
    moments: BatchMoments = getattr(frame, _MOMENTS)[place]
    return moments


def _variables_of_saving() -> dict[str, Any]:
    """What the function that saves tensors at the moment has closed over; nothing where tensors are just kept."""
    if torch.compiler.is_compiling():
        return {}
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return {}
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    if not isinstance(pack, FunctionType):
        return {}
    return dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
