"""Samples of the BatchNorm layers in training, as a run tells them."""

from dataclasses import asdict

from torch import nn

from service.jobs import BatchNormSample, LayerSample, RankFinding, RankQuantity
from syncbn import monitor


class LayerSampler:
    """Samples the layers of ``model`` every ``every`` steps, the steps before ``first_step`` counted; None: never.

    Only the rank that ``leads`` tells samples; the others are spared what it takes to make one of what all have sent.
    """

    def __init__(self, model: nn.Module, every: int | None, first_step: int, *, leads: bool) -> None:
        self._monitor = (
            monitor.BatchNormMonitor(model, every=every, first_step=first_step - 1, is_teller=leads) if every else None
        )

    def after_step(self) -> BatchNormSample | None:
        """The sample of the step that was just taken, if it was to be sampled and this rank leads.

        All ranks must call after every step: those that are sampled end in one exchange.
        """
        sample = self._monitor.step() if self._monitor else None
        return _as_fact(sample) if sample else None


def _as_fact(sample: monitor.BatchNormSample) -> BatchNormSample:
    return BatchNormSample(
        step=sample.step,
        layers=tuple(LayerSample(**asdict(layer)) for layer in sample.layers),
        ranks=tuple(
            RankFinding(**(asdict(finding) | {"quantity": RankQuantity(finding.quantity.value)}))
            for finding in sample.ranks
        ),
        repeating_ranks=sample.repeating_ranks,
        differing_ranks=dict(sample.differing_ranks or {}),
        not_compared=sample.not_compared,
    )
