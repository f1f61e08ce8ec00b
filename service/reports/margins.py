"""What is large enough to matter."""

SMALLEST_LOSS = 0.1
"""Nats. A smaller loss counts as this one: a percentage of next to nothing matters to nobody."""
STALE_SHIFT = 0.05
"""Standard deviations, rms over the channels of a layer. Running means that are off by less are taken for right."""


def practical_size(loss: float) -> float:
    """``loss`` in nats, but at least `SMALLEST_LOSS`; NaN stays NaN."""
    return loss if not abs(loss) < SMALLEST_LOSS else SMALLEST_LOSS
