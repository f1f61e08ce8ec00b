"""BatchNormMonitor: every so many steps, a look at what the BatchNorm layers of all ranks are fed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.agreement import Exchange
from syncbn.batchnorm import SyncBatchNorm
from syncbn.drift.sampling import ImageMoments
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import tracked_layers
from syncbn.monitor.channels import channel_states, root_mean_square
from syncbn.monitor.doctor import RankDoctor
from syncbn.monitor.heard import Heard
from syncbn.monitor.listening import Listening
from syncbn.monitor.sample import BatchNormSample, LayerSample, layer_sample

_SETTLED_STEPS = 100  # from here on a layer's values are held to be of their usual size


class BatchNormMonitor:
    """Samples the BatchNorm layers of ``model``, torch's or ours, in every ``every``-th training step.

    ::

        monitor = BatchNormMonitor(model, every=20)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            sample = monitor.step()  # None, save in every 20th step

    A step is all that is between two calls of `step`: several forwards, as with accumulated gradients, count
    together, as do several calls of one layer. Evaluation in between, recomputation by activation checkpointing, masked
    positions and frozen layers do not count; a rank may have no images. Inside compiled code nothing is seen.

    Training is the same with and without, to the last bit: hooks only read, and only in sampled steps are there any.
    Ranks are compared on the assumption that they have the same weights, as DistributedDataParallel sees to.

    Cost: in a sampled step a few passes over each layer's input, and ONE gather of ``10C + 8`` doubles a layer, which
        waits for the device; otherwise nothing but a count.
    Raises: ValueError if ``every`` or ``first_step`` is out of range, and naming a layer that is still lazy.

    Args:
        model: as it is trained; make the monitor after layers were converted. Of DistributedDataParallel the module
            inside is named.
        every: steps from one sample to the next, at least 1.
        first_step: steps that were taken before, so that a run that is taken up again samples the same ones.
        process_group: whose ranks are compared; None for the default group, if there is one.
        false_alarms: probability that in a whole run any rank is found without a cause, see `RankDoctor`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 20,
        first_step: int = 0,
        process_group: ProcessGroup | None = None,
        false_alarms: float = 0.01,
    ) -> None:
        if every < 1 or first_step < 0:
            raise ValueError(f"every must be at least 1 and first_step at least 0, got {every} and {first_step}")
        self._layers = tracked_layers(model)
        self._every = every
        self._num_steps = first_step
        self._group = peers(process_group)
        self._doctor = RankDoctor(1 if self._group is None else self._group.size(), false_alarms=false_alarms)
        self._usual_size: dict[str, tuple[int, Tensor]] = {}
        self._listening: Listening | None = None
        self._is_detached = False
        self._prepare()

    def step(self) -> BatchNormSample | None:
        """End a training step; its sample, on every rank the same, if it was to be sampled, else None.

        Call it after each step, on all ranks; where a sample is due they exchange.

        Raises:
            RanksDisagree: if ranks are not at the same step, or their models differ in layers.
            RanksMissing: if a rank does not come within the process group's timeout.
        """
        listening, self._listening = self._listening, None
        self._num_steps += 1
        heard = None if listening is None else listening.stop()
        self._prepare()
        return None if heard is None or not heard else self._sample(heard)

    def detach(self) -> None:
        """Take off what hooks there are, for good: `step` then only counts. To be called on all ranks or none."""
        self._is_detached = True
        if self._listening is not None:
            self._listening.stop()
            self._listening = None

    def __enter__(self) -> BatchNormMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _prepare(self) -> None:
        """Listen, if the step that begins is to be sampled."""
        if not self._is_detached and (self._num_steps + 1) % self._every == 0:
            self._listening = Listening(self._layers)

    def _sample(self, heard: Sequence[Heard]) -> BatchNormSample:
        by_layer = self._exchanged(heard)
        ran = {path: ranks for path, ranks in by_layer.items() if any(rank.num_calls > 0 for rank in ranks)}
        paths = sorted(ran, key=lambda path: _mean_place(ran[path]))
        samples = tuple(self._layer_sample(path, ran[path]) for path in paths if _num_images(ran[path]))
        compared = self._compared(paths)
        return BatchNormSample(
            step=self._num_steps,
            layers=samples,
            ranks=self._doctor.look({path: [rank.moments for rank in ran[path]] for path in compared}),
            repeating_ranks=self._doctor.repeating_ranks,
            differing_ranks=self._differing_ranks(ran),
            not_compared=tuple(paths[len(compared) :]),
            idle=tuple(path for path in self._layers if path not in ran),
        )

    def _exchanged(self, heard: Sequence[Heard]) -> dict[str, list[Heard]]:
        """What each rank heard, by layer. Ranks that heard nothing join too: the others would wait for them."""
        vector = torch.cat([layer.pack() for layer in heard])
        exchange = Exchange(f"sample of BatchNorm layers in step {self._num_steps}", num_values=vector.numel())
        rows = gather_over_ranks(vector, self._group, exchange).cpu()  # (W, K)
        sizes = [Heard.num_values(layer.num_features) for layer in self._layers.values()]
        parts = torch.split(rows, sizes, dim=1)
        return {path: [Heard.unpack(row) for row in part] for path, part in zip(self._layers, parts, strict=True)}

    def _layer_sample(self, path: str, ranks: Sequence[Heard]) -> LayerSample:
        layer = self._layers[path]
        pooled = ranks[0].moments
        for rank in ranks[1:]:
            pooled = pooled.merge(rank.moments)
        running = next(rank for rank in ranks if rank.num_calls > 0)
        num_positive = torch.stack([rank.num_positive for rank in ranks]).sum(0)
        states = channel_states(pooled, running.weight_size, num_positive, layer.eps, self._size_before(path, pooled))
        return layer_sample(
            path, layer, ranks, pooled, is_synchronized=_is_synchronized(layer, self._group), states=states
        )

    def _size_before(self, path: str, moments: ImageMoments) -> Tensor | None:
        """Root mean square of the channels in the first sample, or the first after they have settled."""
        since, usual = self._usual_size.get(path, (-1, None))
        size = root_mean_square(moments)
        is_new = usual is None or since < _SETTLED_STEPS <= self._num_steps
        if is_new and bool(size.isfinite().all()):
            self._usual_size[path] = (self._num_steps, size)
        return usual

    def _compared(self, paths: Sequence[str]) -> list[str]:
        """Layers up to the first that is not synchronized, it included: what it is fed still passed no other one."""
        local = [place for place, path in enumerate(paths) if not _is_synchronized(self._layers[path], self._group)]
        return list(paths[: local[0] + 1] if local else paths)

    def _differing_ranks(self, ran: Mapping[str, Sequence[Heard]]) -> dict[str, tuple[int, ...]]:
        synchronized = {p: ranks for p, ranks in ran.items() if _is_synchronized(self._layers[p], self._group)}
        differing = {path: _outvoted([float(rank.digest) for rank in ranks]) for path, ranks in synchronized.items()}
        return {path: ranks for path, ranks in differing.items() if ranks}


def _is_synchronized(layer: _BatchNorm, group: ProcessGroup | None) -> bool:
    """Whether all ranks of ``group`` normalize by the same statistics in this layer."""
    if group is None:
        return True
    if not isinstance(layer, SyncBatchNorm | nn.SyncBatchNorm):
        return False
    members = dist.get_process_group_ranks(layer.process_group)
    return set(dist.get_process_group_ranks(group)) <= set(members)


def _mean_place(ranks: Sequence[Heard]) -> float:
    places = [float(rank.place) for rank in ranks if rank.num_calls > 0]
    return sum(places) / len(places)


def _num_images(ranks: Sequence[Heard]) -> int:
    return int(sum(float(rank.moments.num_images) for rank in ranks))


def _outvoted(digests: Sequence[float]) -> tuple[int, ...]:
    """Who has another digest than most; all if none is that of most."""
    (digest, most), *others = Counter(digests).most_common()
    if not others:
        return ()
    usual = digest if all(count < most for _, count in others) else None
    return tuple(rank for rank, own in enumerate(digests) if own != usual)
