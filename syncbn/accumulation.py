"""Running statistics over micro-batches: one update for all of them, as for the batch that they make up."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from syncbn.batchnorm import SyncBatchNorm
from syncbn.functional import track
from syncbn.layers import tracked_layers
from syncbn.moments import BatchMoments


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block, every SyncBatchNorm collects what it is fed; at its end that is tracked as ONE batch.

    For gradient accumulation: forward and backward of all micro-batches of an optimizer step belong inside.

    Exact: running statistics and ``num_batches_tracked`` move as for one batch of all values that a layer was fed, on
        all ranks and in all micro-batches, which may differ in size; the variance between micro-batches is in it.
        ``momentum`` then means the same however many micro-batches make a step.
    Not exact: each micro-batch is normalized, and differentiated, by its own statistics (those of all ranks'
        together), so that what the second layer is fed is not what it would be with the joined batch. No single sweep
        can do better. For a step that is the joined batch's in all, pass it whole and spare memory by
        `torch.utils.checkpoint` without reentrance, which recomputes activations but exchanges nothing again.
    Cost: no exchange, and ``2C + 1`` doubles kept a layer.
    Limits: layers of torch's own classes go on as ever: convert them. If the block raises, statistics stay as they
        were. Compiled layers are compiled anew at the first block.
    """
    with ExitStack() as stack:
        collected = [
            stack.enter_context(_collecting(layer))
            for layer in tracked_layers(model).values()
            if isinstance(layer, SyncBatchNorm)
        ]
        yield
        for part in collected:
            part.track()


class _Collected:
    """What one layer was fed."""

    def __init__(self, layer: SyncBatchNorm) -> None:
        assert layer.running_mean is not None
        self._layer = layer
        self._moments = BatchMoments.empty(layer.num_features, layer.running_mean.device)

    def add(self, batch: BatchMoments) -> None:
        self._moments = self._moments.merge(batch)

    def track(self) -> None:
        """Move the layer's running statistics towards everything together; not at all if it was nothing."""
        layer = self._layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        track(self._moments, layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum)


@contextmanager
def _collecting(layer: SyncBatchNorm) -> Iterator[_Collected]:
    collected = _Collected(layer)
    before = layer.instead_of_tracking
    layer.instead_of_tracking = collected.add
    try:
        yield collected
    finally:
        layer.instead_of_tracking = before
