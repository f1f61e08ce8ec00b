"""StatisticsHistory: the running statistics after each of the last training steps, and with them the batches' own."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.freezing import is_frozen
from syncbn.layers import tracked_layers


@dataclass(frozen=True, eq=False)
class LayerTrack:
    """What one layer's statistics did, step by step; ``T`` steps.

    Shape: ``start`` is ``(2C,)``: running mean, then unbiased variance, before the first step. ``batches`` is
        ``(T, 2C)``: the mean and the unbiased variance that each step moved them towards. ``num_batches`` is ``(T,)``,
        how many batches the layer tracked in each step (0 where it did not run). All float64 on the model's device.
    ``num_batches_before``: how many batches the statistics at ``start`` had seen.
    ``momenta``: those that the steps were taken with; None is the mean over all batches.
    """

    start: Tensor
    batches: Tensor
    num_batches: Tensor
    num_batches_before: int
    momenta: frozenset[float | None]


class StatisticsHistory:
    """Keeps the running statistics of every BatchNorm of ``model``, torch's or ours, over the last ``capacity`` steps.

    Call `record` once after each training step. A step moves the running mean ``u`` to ``u + a * (m - u)``, with the
    momentum ``a`` and the batch's mean ``m``, so that two neighbouring values of ``u`` tell ``m``; the variance
    likewise. What is kept is an exact copy of the buffers, and nothing is lost by keeping it in their own type. What
    was lost before is their rounding: ``m`` is recovered to about ``6e-8 / a`` of ``|u|`` with buffers in float32,
    and statistics replayed with the momentum ``b`` are good to ``6e-8 * max(1, b / a)`` of ``|u|``, because the
    roundings of neighbouring steps cancel.

    Layers that are frozen when the history is made are left out. A layer that runs ``k`` times between two records
    counts as ``k`` batches that are all like their (weighted) mean, which is exact for the momentum in use only:
    record after each forward pass, or within `accumulate_statistics` after the block, to be exact for all.

    Memory: ``capacity + 1`` rows of ``2 * sum(C)`` values of the buffers' type, and of one integer a layer, taken at
        once. Cost: `record` is two copies, whatever the number of layers; it does not wait for the device.
    Limits: who else writes the buffers between two records (`apply_statistics`, a checkpoint) must call `restart`.
        Where DistributedDataParallel broadcasts the buffers of unsynchronized layers, as it does unless told not to,
        the history of rank 0 alone is right.
    Raises: ValueError if ``capacity`` is not positive, if a layer has a momentum of 0 (its statistics keep no trace of
        its batches) or buffers of half precision (too coarse to recover them), or if layers are on several devices.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a history of {capacity} steps holds nothing; give a capacity of 1 or more")
        tracked = tracked_layers(model)
        self._layers = {path: layer for path, layer in tracked.items() if not is_frozen(layer)}
        for path, layer in self._layers.items():
            _check_recoverable(path, layer)
        buffers = [_buffer(layer, "running_mean") for layer in self._layers.values()]
        devices = {buffer.device for buffer in buffers}
        if len(devices) > 1:
            raise ValueError(f"layers on several devices, {sorted(map(str, devices))}: make a history of each part")
        device = devices.pop() if devices else None
        dtype = torch.float64 if torch.float64 in {buffer.dtype for buffer in buffers} else torch.float32
        self._sizes = [2 * layer.num_features for layer in self._layers.values()]
        self._values = torch.zeros(capacity + 1, sum(self._sizes), dtype=dtype, device=device)
        self._counts = torch.zeros(capacity + 1, len(self._layers), dtype=torch.int64, device=device)
        self._momenta: deque[tuple[float | None, ...]] = deque(maxlen=capacity)
        self._num_rows = 0
        self.restart()

    @property
    def num_steps(self) -> int:
        """How many steps are kept now; at most ``capacity``."""
        return len(self._momenta)

    def restart(self) -> None:
        """Forget every step, and begin again from the running statistics as they are now."""
        self._momenta.clear()
        self._num_rows = 0
        self._keep()

    def record(self) -> None:
        """Keep the running statistics as the step left them; the oldest step gives way if the history is full."""
        momenta = tuple(layer.momentum for layer in self._layers.values())
        if self._momenta and self._momenta[-1] == momenta:
            momenta = self._momenta[-1]  # one tuple for all steps that share it
        self._momenta.append(momenta)
        self._keep()

    @torch.no_grad()
    def tracks(self) -> dict[str, LayerTrack]:
        """What each layer's statistics did, by path in the order of modules. Waits for the device."""
        rows = torch.arange(self._num_rows - self.num_steps - 1, self._num_rows, device=self._values.device)
        rows = rows % len(self._values)
        values = torch.split(self._values[rows], self._sizes, dim=1)
        counts = self._counts[rows]
        return {
            path: _track(values[i].double(), counts[:, i], [momenta[i] for momenta in self._momenta])
            for i, path in enumerate(self._layers)
        }

    @torch.no_grad()
    def _keep(self) -> None:
        if not self._layers:
            return
        row = self._num_rows % len(self._values)
        layers = self._layers.values()
        values = [_buffer(layer, name) for layer in layers for name in ("running_mean", "running_var")]
        torch.cat(values, out=self._values[row])
        torch.stack([_buffer(layer, "num_batches_tracked") for layer in layers], out=self._counts[row])
        self._num_rows += 1


def _track(values: Tensor, counts: Tensor, momenta: list[float | None]) -> LayerTrack:
    """From statistics ``(T + 1, 2C)``, counters ``(T + 1,)`` and the momentum of each step."""
    num_batches = (counts[1:] - counts[:-1]).clamp(min=0).double()
    # The share of the step's batches in the statistics; with momentum=None they are the mean over all.
    mean_of_all = num_batches / counts[1:].clamp(min=1)
    momentum = torch.tensor([0.0 if a is None else a for a in momenta], dtype=torch.float64, device=values.device)
    is_mean = torch.tensor([a is None for a in momenta], dtype=torch.bool, device=values.device)
    share = torch.where(is_mean, mean_of_all, 1 - (1 - momentum) ** num_batches)
    moved = (values[1:] - values[:-1]) / torch.where(share > 0, share, 1.0)[:, None]
    return LayerTrack(
        start=values[0],
        batches=values[:-1] + moved,
        num_batches=torch.where(share > 0, num_batches, 0.0),
        num_batches_before=int(counts[0]),
        momenta=frozenset(momenta),
    )


def _check_recoverable(path: str, layer: _BatchNorm) -> None:
    name = path or "the model itself"
    if layer.momentum == 0:
        raise ValueError(f"{name} has momentum=0, and its statistics never move; give it a momentum above 0")
    dtype = _buffer(layer, "running_mean").dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} keeps its running statistics in {dtype}, too coarse to tell a batch from them; "
            "keep the layer in float32, beside half-precision inputs too"
        )


def _buffer(layer: _BatchNorm, name: str) -> Tensor:
    buffer = layer._buffers[name]
    assert buffer is not None
    return buffer
