"""BatchNormMonitor: every so many steps, a look at what the BatchNorm layers of all ranks are fed."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import nn
from torch.distributed import ProcessGroup

from syncbn.agreement import Exchange
from syncbn.drift.sampling import ImageMoments
from syncbn.exchange import gather_over_ranks, peers
from syncbn.layers import tracked_layers
from syncbn.monitor.channels import ChannelStates, channel_states, root_mean_square
from syncbn.monitor.doctor import RankDoctor
from syncbn.monitor.finding import RankFinding
from syncbn.monitor.heard import Heard
from syncbn.monitor.layout import Layout
from syncbn.monitor.listening import Listening
from syncbn.monitor.sample import BatchNormSample, first_to_run, layer_samples
from syncbn.monitor.sharing import are_synchronized, differing_ranks, num_sharing

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
    positions and frozen layers do not count; a rank may have no images. Inside compiled code nothing is heard;
    layers that ran there are told from idle ones by their count of batches.

    Training is the same with and without, to the last bit: hooks only read, and only in sampled steps are there any.
    Ranks are compared on the assumption that they have the same weights, as DistributedDataParallel sees to.

    Cost: in a sampled step three passes over each layer's input or output, ONE gather of ``10C + 9`` doubles a layer,
        which waits for the device, and about as many operations for all layers as for one; otherwise nothing but a
        count.
    Raises: ValueError if ``every`` or ``first_step`` is out of range, and naming a layer that is still lazy.

    Args:
        model: as it is trained; make the monitor after layers were converted. Of DistributedDataParallel the module
            inside is named.
        every: steps from one sample to the next, at least 1.
        first_step: steps that were taken before, so that a run that is taken up again samples the same ones.
        process_group: whose ranks are compared; None for the default group, if there is one.
        false_alarms: probability that in a whole run any rank is found without a cause, see `RankDoctor`.
        is_teller: whether `step` answers with samples on this rank; one that does not want them is spared all of their
            cost but its part in the exchange. All ranks must have the same ``every`` all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 20,
        first_step: int = 0,
        process_group: ProcessGroup | None = None,
        false_alarms: float = 0.01,
        is_teller: bool = True,
    ) -> None:
        if every < 1 or first_step < 0:
            raise ValueError(f"every must be at least 1 and first_step at least 0, got {every} and {first_step}")
        self._layers = tracked_layers(model)
        self._every = every
        self._num_steps = first_step
        self._group = peers(process_group)
        self._doctor = RankDoctor(1 if self._group is None else self._group.size(), false_alarms=false_alarms)
        self._layout = Layout.of({path: layer.num_features for path, layer in self._layers.items()})
        self._is_teller = is_teller
        self._sized_at = [-1] * len(self._layers)
        self._usual_size = torch.full((self._layout.num_channels,), torch.nan, dtype=torch.float64)
        self._listening: Listening | None = None
        self._is_detached = False
        self._prepare()

    def step(self) -> BatchNormSample | None:
        """End a training step; its sample, the same on every rank that tells it, if it was to be sampled, else None.

        Call it after each step, on all ranks; where a sample is due they exchange.

        Raises:
            RanksDisagree: if ranks are not at the same step, or their models differ in layers.
            RanksMissing: if a rank does not come within the process group's timeout.
        """
        listening, self._listening = self._listening, None
        self._num_steps += 1
        if listening is not None:
            listening.stop()
        self._prepare()
        ranks = None if listening is None else self._exchanged(listening)
        return None if ranks is None or not self._is_teller else self._sample(ranks)

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
        if not self._is_detached and self._layers and (self._num_steps + 1) % self._every == 0:
            self._listening = Listening(self._layers)

    def _exchanged(self, listening: Listening) -> Heard:
        """What each rank heard, on the CPU. Ranks that heard nothing join too: the others would wait for them."""
        vector = listening.heard(self._layout, num_sharing(self._layers.values(), self._group)).pack()
        exchange = Exchange(f"sample of BatchNorm layers in step {self._num_steps}", num_values=vector.numel())
        return Heard.unpack(gather_over_ranks(vector, self._group, exchange).cpu(), len(self._layers))

    def _sample(self, ranks: Heard) -> BatchNormSample:
        moments = ranks.moments(self._layout)
        pooled = moments.pooled()
        is_synchronized = are_synchronized(ranks)
        states = self._channel_states(ranks, pooled)
        samples = layer_samples(self._layers, self._layout, ranks, pooled, states, is_synchronized)
        ran, unheard = _in_order(ranks), _unheard(ranks)
        compared = _compared(ran, is_synchronized)
        paths = list(self._layers)
        return BatchNormSample(
            step=self._num_steps,
            layers=tuple(samples[layer] for layer in ran if samples[layer].num_images),
            ranks=self._findings([paths[layer] for layer in compared], moments),
            repeating_ranks=self._doctor.repeating_ranks,
            differing_ranks={paths[layer]: who for layer in ran if (who := differing_ranks(ranks, layer))},
            not_compared=tuple(paths[layer] for layer in ran[len(compared) :]),
            unheard=tuple(paths[layer] for layer in unheard),
            idle=tuple(path for number, path in enumerate(paths) if number not in {*ran, *unheard}),
        )

    def _findings(self, paths: Sequence[str], moments: ImageMoments) -> tuple[RankFinding, ...]:
        if paths == list(self._layers):
            return self._doctor.look_at_row(self._layout, moments)
        layout = Layout.of({path: self._layout.sizes[path] for path in paths})
        return self._doctor.look_at_row(layout, moments.of_channels(self._layout.places_of(paths)))

    def _channel_states(self, ranks: Heard, pooled: ImageMoments) -> ChannelStates:
        layout, usual = self._layout, self._usual_size
        self._keep_sizes(pooled)
        eps = torch.tensor([layer.eps for layer in self._layers.values()], dtype=torch.float64)[layout.layer_of]
        weight_size = ranks.weight_size[first_to_run(ranks)[layout.layer_of], torch.arange(layout.num_channels)]
        return channel_states(layout, pooled, weight_size, ranks.num_positive.sum(0), eps, usual)

    def _keep_sizes(self, pooled: ImageMoments) -> None:
        """The root mean square of each layer's channels in its first sample, or its first after they have settled."""
        due = [at < 0 or at < _SETTLED_STEPS <= self._num_steps for at in self._sized_at]
        if not any(due):
            return
        size = torch.where(pooled.num_images > 0, root_mean_square(pooled), torch.nan)
        known = self._layout.by_layer(size.isfinite(), True).all(-1) & torch.tensor(due)
        self._usual_size = torch.where(known[self._layout.layer_of], size, self._usual_size)
        for layer in known.nonzero().flatten().tolist():
            self._sized_at[layer] = self._num_steps


def _in_order(ranks: Heard) -> list[int]:
    """Layers that ran on any rank, in the order in which they did: on the mean over those ranks."""
    ran = ranks.num_calls > 0
    num_ranks = ran.sum(0)
    place = (ranks.place * ran).sum(0) / num_ranks
    layers: list[int] = num_ranks.nonzero().flatten().tolist()
    return sorted(layers, key=place.tolist().__getitem__)


def _unheard(ranks: Heard) -> list[int]:
    """Layers whose running statistics counted batches on any rank, in calls that were heard on none."""
    layers: list[int] = ((ranks.num_updates > 0).any(0) & (ranks.num_calls == 0).all(0)).nonzero().flatten().tolist()
    return layers


def _compared(layers: Sequence[int], is_synchronized: Sequence[bool]) -> Sequence[int]:
    """Layers up to the first that is not synchronized, it included: what it is fed still passed no other one."""
    local = [place for place, layer in enumerate(layers) if not is_synchronized[layer]]
    return layers[: local[0] + 1] if local else layers
