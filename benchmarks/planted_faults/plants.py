"""Faults that are planted in a training run from outside, by torch's own global hooks.

The code that trains is not changed and does not know. A plant acts inside its ``with`` block and leaves nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from service.training.resnet import ResNet20
from syncbn import revert_sync_batchnorm
from syncbn.layers import tracked_layers

# Typed as if hooks could change nothing, which they can.
_register_before: Callable[[Callable[..., Any]], RemovableHandle] = register_module_forward_pre_hook
_register_after: Callable[[Callable[..., Any]], RemovableHandle] = register_module_forward_hook


@dataclass(kw_only=True, eq=False)
class Plant:
    """The base of all plants: on ``rank``, or on every rank if it is None, of the one run in its block.

    ``step`` counts the optimizer's steps, from 0; ``model`` is known from its first forward pass on.
    """

    rank: int | None = None
    step: int = field(default=0, init=False)
    model: nn.Module | None = field(default=None, init=False)
    _paths: "WeakKeyDictionary[nn.Module, str]" = field(default_factory=WeakKeyDictionary, init=False, repr=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False)

    def __enter__(self) -> "Plant":
        self._handles = [
            _register_before(self._before),
            _register_after(self._after),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.model = None

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """What ``module`` is fed in place of ``values``; None for these. The path of the model itself is empty."""
        return None

    def leaves(self, path: str, module: nn.Module, values: Tensor, output: Tensor) -> Tensor | None:
        """What ``module`` gives in place of ``output``; None for this."""
        return None

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to take step ``self.step``, from 1."""

    def after_step(self, model: nn.Module) -> None:
        """The optimizer has taken step ``self.step``, from 1."""

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if _is_model(module) and module not in self._paths:
            # Also a copy of the model, as made to search for numbers that are not finite.
            self._paths.update({part: path for path, part in module.named_modules()})
            self.model = self.model or module
        path = self._paths.get(module)
        if path is None or not args or not self._is_here():
            return None
        changed = self.enters(path, module, args[0])
        return None if changed is None else (changed, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        path = self._paths.get(module)
        if path is None or not args or not self._is_here():
            return None
        return self.leaves(path, module, args[0], output)

    def _before_step(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self.step += 1
        if self._is_here():
            self.before_step(optimizer)

    def _after_step(self, _optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        if self.model is not None and self._is_here():
            with torch.no_grad():
                self.after_step(self.model)

    def _is_here(self) -> bool:
        return self.rank is None or self.rank == (dist.get_rank() if dist.is_initialized() else 0)


def _is_model(module: nn.Module) -> bool:
    return isinstance(module, ResNet20) or (isinstance(module, nn.Sequential) and hasattr(module, "classes"))


def _trains(module: nn.Module) -> bool:
    """In a step: populations are measured in training mode too, but without gradients."""
    return module.training and torch.is_grad_enabled()


def _channel(layer: nn.Module, channel: int) -> Tensor:
    """The weights that lead to one channel."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.weight[channel]


@dataclass(kw_only=True, eq=False)
class OtherPixels(Plant):
    """Images are ``scale * x + offset``, wherever they are used: this rank prepares them in another way."""

    scale: float = 1.0
    offset: float = 0.0

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """The images."""
        return self.scale * values + self.offset if path == "" else None


@dataclass(kw_only=True, eq=False)
class OneImage(Plant):
    """All images of a training batch are its first one."""

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """The images."""
        return values[:1].repeat_interleave(len(values), dim=0) if path == "" and _trains(module) else None


@dataclass(kw_only=True, eq=False)
class NanImage(Plant):
    """One image of the batch of step ``at`` is not a number."""

    at: int

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """The images; of a copy of the model too, that the search may find what the step was fed."""
        if path != "" or self.step + 1 != self.at or not module.training:
            return None
        return torch.cat([torch.full_like(values[:1], torch.nan), values[1:]])


@dataclass(kw_only=True, eq=False)
class StaysInTraining(Plant):
    """The layer does not go to evaluation mode when the model does."""

    layer: str

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """Back to training mode."""
        if path == self.layer and not module.training:
            module.train()
        return None


@dataclass(kw_only=True, eq=False)
class StaysInEvaluation(Plant):
    """BatchNorm layers, or the one that ``layer`` names, train in evaluation mode."""

    layer: str | None = None

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """To evaluation mode, before the model runs."""
        if path == "" and _trains(module):
            for name, layer in tracked_layers(module).items():
                if self.layer in (None, name):
                    layer.eval()
        return None


@dataclass(kw_only=True, eq=False)
class ScaledRow(Plant):
    """After step ``at`` the weights of one channel are ``factor`` times as large."""

    layer: str
    channel: int
    factor: float
    at: int

    def after_step(self, model: nn.Module) -> None:
        """Once."""
        if self.step == self.at:
            _channel(model.get_submodule(self.layer), self.channel).mul_(self.factor)


@dataclass(kw_only=True, eq=False)
class ZeroRow(Plant):
    """The weights of one channel are 0, from step ``at`` on."""

    layer: str
    channel: int
    at: int = 1

    def after_step(self, model: nn.Module) -> None:
        """Again and again: normalized rounding errors have gradients."""
        if self.step >= self.at:
            _channel(model.get_submodule(self.layer), self.channel).zero_()


@dataclass(kw_only=True, eq=False)
class LowBias(Plant):
    """After step ``at`` the biases of some channels of a BatchNorm layer are ``value``."""

    layer: str
    channels: tuple[int, ...]
    at: int
    value: float = -10.0

    def after_step(self, model: nn.Module) -> None:
        """Once."""
        if self.step == self.at:
            layer = model.get_submodule(self.layer)
            assert isinstance(layer, _BatchNorm)
            assert layer.bias is not None
            layer.bias[list(self.channels)] = self.value


@dataclass(kw_only=True, eq=False)
class NoNormalization(Plant):
    """BatchNorm layers pass on what they are fed. Their parameters still take part, that DDP may find them."""

    def leaves(self, path: str, module: nn.Module, values: Tensor, output: Tensor) -> Tensor | None:
        """The input."""
        return values + 0.0 * output if isinstance(module, _BatchNorm) else None


@dataclass(kw_only=True, eq=False)
class OldStatistics(Plant):
    """The running statistics that were after step ``of`` are put back after step ``at``, beside newer weights."""

    of: int
    at: int
    _kept: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def after_step(self, model: nn.Module) -> None:
        """Keep, then put back."""
        layers = tracked_layers(model).values()
        running = [buffer for layer in layers for buffer in layer.buffers() if buffer.is_floating_point()]
        if self.step == self.of:
            self._kept = [tensor.clone() for tensor in running]
        if self.step == self.at:
            for tensor, old in zip(running, self._kept, strict=True):
                tensor.copy_(old)


@dataclass(kw_only=True, eq=False)
class RestlessLoss(Plant):
    """From step ``at`` on nothing is learned any more, and logits are scaled by the exponential of AR(1) noise."""

    at: int
    seed: int
    correlation: float = 0.9
    sd: float = 0.2
    _level: float = field(default=0.0, init=False, repr=False)
    _random: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def __enter__(self) -> Plant:
        self._random.manual_seed(self.seed)
        return super().__enter__()

    def leaves(self, path: str, module: nn.Module, values: Tensor, output: Tensor) -> Tensor | None:
        """The logits, in a step."""
        if path != "" or not _trains(module) or self.step + 1 < self.at:
            return None
        innovation = self.sd * (1 - self.correlation**2) ** 0.5
        self._level = self.correlation * self._level + innovation * float(torch.randn((), generator=self._random))
        scaled: Tensor = output * torch.tensor(self._level, dtype=output.dtype).exp()
        return scaled

    def before_step(self, optimizer: Optimizer) -> None:
        """The loop sets the rate anew before each step."""
        if self.step >= self.at:
            for group in optimizer.param_groups:
                group["lr"] = 0.0


@dataclass(kw_only=True, eq=False)
class UnconvertedModel(Plant):
    """BatchNorm layers were not converted on this rank: it does not come to the exchanges of the others."""

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """Before the first step."""
        if path == "" and self.step == 0:
            revert_sync_batchnorm(module)
        return None


@dataclass(kw_only=True, eq=False)
class GroupOfItsOwn(Plant):
    """Rank ``alone`` normalizes by its own batches, and the others by theirs: nobody waits, and the ranks differ.

    To be entered on all ranks, since they make process groups together.
    """

    alone: int
    _groups: dict[bool, dist.ProcessGroup] = field(default_factory=dict, init=False, repr=False)

    def __enter__(self) -> Plant:
        others = [rank for rank in range(dist.get_world_size()) if rank != self.alone]
        is_alone = dist.get_rank() == self.alone
        groups: dict[bool, Any] = {True: dist.new_group([self.alone]), False: dist.new_group(others)}
        self._groups = {is_alone: groups[is_alone]}
        return super().__enter__()

    def enters(self, path: str, module: nn.Module, values: Tensor) -> Tensor | None:
        """Before the first step."""
        if path == "" and self.step == 0:
            (group,) = self._groups.values()
            for layer in tracked_layers(module).values():
                layer.process_group = group  # type: ignore[assignment]
        return None


PLANTS: dict[str, Callable[..., Plant]] = {
    kind.__name__: kind
    for kind in (
        OtherPixels,
        OneImage,
        NanImage,
        StaysInTraining,
        StaysInEvaluation,
        ScaledRow,
        ZeroRow,
        LowBias,
        NoNormalization,
        OldStatistics,
        RestlessLoss,
        UnconvertedModel,
        GroupOfItsOwn,
    )
}
"""By name, for processes that are told by text what to plant."""
