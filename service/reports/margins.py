"""How large a loss is taken to be when a share of it is to matter."""

SMALLEST_LOSS = 0.1
"""Nats. A smaller loss counts as this one: a percentage of next to nothing matters to nobody."""


def practical_size(loss: float) -> float:
    """``loss`` in nats, but at least `SMALLEST_LOSS`; NaN stays NaN."""
    return loss if not abs(loss) < SMALLEST_LOSS else SMALLEST_LOSS
