"""Layers in the wrong mode, proved and not guessed: what a model in evaluation mode must do, and one in training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from service.jobs import ModeFault, ModeFaultKind
from service.training.evaluation import evaluation_mode
from syncbn.freezing import is_frozen
from syncbn.layers import tracked_layers

NUM_PROBE_IMAGES = 4
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Of a layer's largest output: a thousand times and more what other kernels for other batch sizes change."""

_State = dict[str, list[Tensor]]


class ModeWatch:
    """Watches one run's ``model`` for layers in the wrong mode, with ``images`` ``(N, C, H, W)`` as its probe.

    Each look yields at most one fault of a kind, for the first layer in question.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._model = model
        self._images = images[:NUM_PROBE_IMAGES]
        self._counters = _counters(model)
        self._step: int | None = None

    def in_training(self, step: int) -> Iterator[ModeFault]:
        """Since the last call, or since the run began, every layer's counter of batches must have moved.

        Frozen layers and those that count nothing apart. Call at most once a step.
        """
        before, self._counters = self._counters, _counters(self._model)
        still = [path for path, count in self._counters.items() if before[path] == count]
        if still and self._step != step:
            others = f", and {len(still) - 1} more," if len(still) > 1 else ""
            yield ModeFault(
                step=step,
                kind=ModeFaultKind.FROZEN_IN_TRAINING,
                layer=still[0],
                detail=f"its count of batches{others} is {self._counters[still[0]]} as at the last look, although "
                "steps were taken: the layer was in evaluation mode, or was not reached, while the model trained",
            )
        self._step = step

    @contextmanager
    def during_evaluation(self, step: int, faults: list[ModeFault]) -> Iterator[None]:
        """Inside, nothing may move the running statistics or their counters; what did is added to ``faults``."""
        before = _state(self._model)
        yield
        moved = [path for path, now in _state(self._model).items() if not _same(before[path], now)]
        if moved:
            others = f", and those of {len(moved) - 1} more layers," if len(moved) > 1 else ""
            faults.append(
                ModeFault(
                    step=step,
                    kind=ModeFaultKind.MOVED_IN_EVALUATION,
                    layer=moved[0],
                    detail=f"its running statistics or their counter{others} changed while the model was judged: "
                    "the layer stays in training mode when the model is told to evaluate",
                )
            )

    def in_evaluation(self, step: int) -> Iterator[ModeFault]:
        """An image among others must be judged as it is among copies of itself.

        Two forward passes of at most 4 images in evaluation mode; statistics that they move are put back. A layer at
        fault may meet other ranks, so all must call.
        """
        if len(self._images) < 2:
            return
        before = _state(self._model)
        with evaluation_mode(self._model), torch.no_grad():
            among_others = self._outputs(self._images)
            among_copies = self._outputs(self._images[:1].repeat_interleave(2, dim=0))
        _restore(self._model, before)
        if not among_others or not _differ(among_others[-1][1], among_copies[-1][1]):
            return
        pairs = zip(among_others, among_copies, strict=True)
        layer = next(path for (path, one), (_, other) in pairs if _differ(one, other))
        yield ModeFault(
            step=step,
            kind=ModeFaultKind.BATCH_IN_EVALUATION,
            layer=layer,
            detail="in evaluation mode an image has another output here among other images than among copies of "
            "itself: the layer goes by the batch, as in training",
        )

    def _outputs(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """What each module made of the first image, in order of execution; the model itself is last."""
        outputs: list[tuple[str, Tensor]] = []
        paths = {module: path for path, module in self._model.named_modules()}

        def note(module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((paths[module], output[0]))

        handles = [module.register_forward_hook(note) for module in paths]
        try:
            self._model(images)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than rounding; NaN is like NaN, for a model that has diverged is at no fault of mode."""
    scale = max(one.abs().nan_to_num().max().item(), other.abs().nan_to_num().max().item())
    return not torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE[one.dtype] * scale, equal_nan=True)


def _state(model: nn.Module) -> _State:
    return {path: [buffer.clone() for buffer in layer.buffers()] for path, layer in tracked_layers(model).items()}


def _restore(model: nn.Module, state: _State) -> None:
    for path, layer in tracked_layers(model).items():
        if not _same(state[path], list(layer.buffers())):
            for buffer, value in zip(layer.buffers(), state[path], strict=True):
                buffer.copy_(value)


def _same(before: list[Tensor], now: list[Tensor]) -> bool:
    return all(((a == b) | (a.isnan() & b.isnan())).all() for a, b in zip(before, now, strict=True))


def _counters(model: nn.Module) -> dict[str, int]:
    """Of the layers that are to move in training."""
    layers = {path: layer for path, layer in tracked_layers(model).items() if not is_frozen(layer)}
    counters = {p: layer.num_batches_tracked for p, layer in layers.items() if layer.num_batches_tracked is not None}
    return dict(zip(counters, torch.stack(list(counters.values())).tolist() if counters else [], strict=True))
