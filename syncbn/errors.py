"""What an exchange between ranks can fail with, as one tree.

::

    ExchangeError            RuntimeError
    |- RanksDisagree         all ranks came, and not all with the same thing
    `- RanksMissing          a rank did not come in time, or its connection was lost
"""

from collections.abc import Sequence


class ExchangeError(RuntimeError):
    """An exchange failed. Raised by every rank that takes part in it, in the forward or in the backward.

    Attributes:
        layer: path of the layer on this rank, "" if it has no name (`name_layers` gives one).
        ranks: the ranks, by their numbers in the default group, that differ from most or are missing; all where the
            two sides are equally many.
        detail: what happened, where each rank is, and what to do about it; one line.
    """

    # Only the text is required: this is how an exception is made again on the other side of a pickle.
    def __init__(self, detail: str, layer: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(detail)
        self.layer = layer
        self.ranks = tuple(ranks)
        self.detail = detail


class RanksDisagree(ExchangeError):
    """The ranks met with different layers, directions, numbers of channels or input types.

    All ranks raise it, out of the same collective, which is complete: the process group stays usable.
    """


class RanksMissing(ExchangeError):
    """A rank did not come within the process group's timeout, or its connection was lost.

    Every rank that waits raises it, at most `syncbn.absence.ACCOUNTS_S` after torch gave up. The process group is
    unusable from then on, as after any failed collective: destroy it. Ranks that come later raise it at once.
    """
