"""Recording: what one layer is fed in a training step, over all of its calls."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.drift.image_sums import ImageSums

_BLOCK = 1 << 16  # values; stay in cache between two passes


class Recording:
    """Of one ``layer``, which had tracked ``num_batches``, ``()``, when the step began; None if it counts none.

    Until `begin` all is as for a layer that does not run; nothing is written, no device waits.
    """

    def __init__(self, layer: _BatchNorm, num_batches: Tensor | None) -> None:
        self.num_calls = 0
        self.place = 0
        self._layer = layer
        self._running_mean: Tensor | None = None
        self._num_batches = num_batches
        self._weight: Tensor | None = None
        self._num_positive: Tensor | None = None
        self._sums: ImageSums | None = None

    def begin(self, place: int) -> None:
        """Before the first call, the ``place``-th of a layer: keep what it will be compared with."""
        self.place = place
        self._running_mean = self.running_mean_now.clone()
        if self._counter is not None:
            self._num_batches = self._counter.clone()  # a state dict may have been loaded meanwhile
        if self._layer.weight is not None:
            # A copy, and at once: the optimizer moves it, and a sharded one is whole only in the forward.
            self._weight = self._layer.weight.detach().clone()

    def add_input(self, input: Tensor, mask: Tensor | None) -> None:
        """Of one call, about to be made."""
        self.num_calls += 1
        with torch.no_grad():
            sums = ImageSums.of(input, mask)
            self._sums = sums if self._sums is None else self._sums.followed_by(sums)

    def add_output(self, output: Tensor) -> None:
        """Of the same call."""
        with torch.no_grad():
            number = _num_positive(output.detach())
            self._num_positive = number if self._num_positive is None else self._num_positive + number

    @property
    def sums(self) -> ImageSums:
        """Of all inputs."""
        return self._sums or ImageSums.none(self._layer.num_features, self.running_mean_now.device)

    @property
    def num_positive(self) -> Tensor:
        """How many outputs are above zero, ``(C,)``."""
        return torch.zeros_like(self.running_mean_now) if self._num_positive is None else self._num_positive

    @property
    def running_mean(self) -> Tensor:
        """Before the step, ``(C,)``."""
        return self.running_mean_now if self._running_mean is None else self._running_mean

    @property
    def weight(self) -> Tensor:
        """As the step was taken with, ``(C,)``; ones if the layer has none, or did not run."""
        return torch.ones_like(self.running_mean_now) if self._weight is None else self._weight

    @property
    def num_batches(self) -> Tensor:
        """How many the running statistics had tracked before the step, ``()``; 0 if they are not counted."""
        return self._scalar(0) if self._num_batches is None else self._num_batches

    @property
    def num_updates(self) -> Tensor:
        """Of the running statistics in the step, ``()``, heard or not; the calls heard if they are not counted."""
        return self._scalar(self.num_calls) if self._counter is None else self._counter - self.num_batches

    @property
    def running_mean_now(self) -> Tensor:
        """``(C,)``."""
        assert self._layer.running_mean is not None
        return self._layer.running_mean.detach()

    @property
    def running_var_now(self) -> Tensor:
        """``(C,)``."""
        assert self._layer.running_var is not None
        return self._layer.running_var.detach()

    @property
    def _counter(self) -> Tensor | None:
        counter = self._layer.num_batches_tracked
        return None if counter is None else counter.detach()

    def _scalar(self, value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=self.running_mean_now.device)


def _num_positive(output: Tensor) -> Tensor:
    """By channel, ``(C,)``. Ones in float32 add up several times as fast as truth values do, and exactly by image."""
    number = torch.zeros(output.shape[:2], dtype=torch.float32, device=output.device)
    if output.numel() == 0:
        return number.sum(0, dtype=torch.float64)
    values = output.view(*output.shape, 1).flatten(2)  # (N, C, S)
    num_images = max(1, _BLOCK // values[0].numel()) if output.device.type == "cpu" else len(values)
    # One piece of memory for all blocks: on a CPU, pages that are new cost more than what is done in them.
    ones = torch.empty_like(values[:num_images], dtype=torch.float32)
    for block, counts in zip(torch.split(values, num_images), torch.split(number, num_images), strict=True):
        torch.sum(torch.gt(block, 0, out=ones[: len(block)]), 2, out=counts)
    return number.sum(0, dtype=torch.float64)
