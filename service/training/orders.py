"""What may be asked of a run while it trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Orders:
    """What someone outside wants of the run as a whole, as far as one rank has heard.

    ``checkpoint_requests`` counts how often a checkpoint has been asked for over the job's whole life: one is owed
    while the count is above the ``requests_met`` of the newest checkpoint.
    """

    stop: bool = False
    """Save a checkpoint and leave."""
    checkpoint_requests: int = 0
