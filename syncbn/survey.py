"""RankSurvey: what the BatchNorm layers of every rank are fed in some training steps, and the advice that follows."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from syncbn.agreement import Exchange
from syncbn.drift.sampling import ImageMoments
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import running_moments, tracked_layers
from syncbn.monitor.listening import Listening
from syncbn.rank_variances import LayerBatches
from syncbn.sync_advice import SyncAdvice, advise


class RankSurvey:
    """Listens to every BatchNorm of ``model``, torch's or ours, until it is asked for `advice`.

    ::

        with RankSurvey(model) as survey:
            for images, labels in itertools.islice(batches, 20):
                ...  # a training step
                survey.step()
            print(survey.advice().sentence)

    Local layers are the ones in question, but synchronized ones tell as much. Ranks need the same weights, as with
    DistributedDataParallel, and the same number of steps; how far the weights move does not matter. A step is what
    is between two calls of `step`; evaluation, recomputation, masked positions and frozen layers do not count.

    Training is the same with and without: hooks only read. Cost: a few passes over each layer's input; ``3C + 2``
    doubles kept a layer and step, and ONE gather of them all for `advice`.
    Raises: ValueError for a model without such layers, and naming a layer that is still lazy.
    """

    def __init__(self, model: nn.Module, *, process_group: ProcessGroup | None = None) -> None:
        self._layers = tracked_layers(model)
        if not self._layers:
            raise ValueError("the model has no BatchNorm with running statistics, and so nothing to advise on")
        self._device = running_moments(next(iter(self._layers.values())))[0].device
        self._group = peers(process_group)
        self._steps: list[Tensor] = []
        self._listening: Listening | None = Listening(self._layers)

    def step(self) -> None:
        """End a training step."""
        if self._listening is None:
            raise RuntimeError("this survey is closed; make a new one for more steps")
        self._listening.stop()
        self._steps.append(torch.cat([_packed(moments) for moments in self._listening.moments()]))
        self._listening = Listening(self._layers)

    def advice(self, *, seed: int = 0) -> SyncAdvice:
        """What the steps so far say, on every rank the same; all ranks must call. ``seed`` is that of its test.

        Layers that no rank has run are left out. The others come in the order of modules.

        Raises:
            ValueError: if no layer was fed anything in training mode, or what is not finite.
            RanksDisagree: if ranks took different numbers of steps, or their models differ in layers.
            RanksMissing: if a rank does not come within the process group's timeout.
        """
        num_steps, sizes = len(self._steps), [3 * layer.num_features + 2 for layer in self._layers.values()]
        count = torch.tensor([num_steps], dtype=torch.float64, device=self._device)
        vector = torch.cat([count, *self._steps])
        exchange = Exchange(f"survey of BatchNorm layers over {num_steps} steps", num_values=vector.numel())
        rows = gather_over_ranks(vector, self._group, exchange)[:, 1:].cpu()
        by_step = rows.reshape(len(rows), num_steps, sum(sizes)).transpose(0, 1)  # (K, R, sum of 3C + 2)
        parts = torch.split(by_step, sizes, dim=2)
        layers = {path: _unpacked(part) for path, part in zip(self._layers, parts, strict=True)}
        return advise({path: layer for path, layer in layers.items() if bool(layer.images.any())}, seed=seed)

    def close(self) -> None:
        """Take the hooks off; what was heard stays."""
        if self._listening is not None:
            self._listening.stop()
            self._listening = None

    def __enter__(self) -> RankSurvey:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _packed(moments: ImageMoments) -> Tensor:
    """``[n, S, mean, var, sum over images of (S (g - mean))^2]``, ``(3C + 2,)``."""
    scalars = torch.stack([moments.num_images, moments.positions])
    return torch.cat([scalars, moments.mean, moments.var, moments.sums[1]])


def _unpacked(rows: Tensor) -> LayerBatches:
    """From ``(K, R, 3C + 2)``."""
    images, positions = rows[..., 0], rows[..., 1]
    mean, var, squares = rows[..., 2:].chunk(3, dim=2)
    between = squares / ((images - 1) * positions.square()).unsqueeze(2)
    return LayerBatches(images, mean, var, between.where(images.unsqueeze(2) > 1, torch.nan))
