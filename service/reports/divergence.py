"""Says whether and where a training loss has diverged."""

import math
from collections.abc import Iterable

import numpy as np

from service.jobs import Convergence, ConvergenceVerdict, NonFinite, NonFiniteOrigin, NonFinitePlace
from service.reports.blocks import Series, block_means
from service.reports.margins import practical_size

DIVERGED_FACTOR = 3.0
BEST_BLOCKS = 5
_ORDER = tuple(NonFinitePlace)
"""Of execution; what came from another rank is last."""


def find_origin(facts: Iterable[tuple[int, NonFinite]], step: int | None = None) -> NonFiniteOrigin | None:
    """Where it began: the earliest in order of execution of what the ranks found at ``step``, or at the first step.

    ``facts`` are pairs of rank and finding. A rank whose own numbers were finite until those of another one came
    (`NonFinitePlace.OTHER_RANK`) is named only where no rank found anything of its own.
    """
    found = [(rank, fact) for rank, fact in facts if step is None or fact.step == step]
    if not found:
        return None
    _, first = min(found, key=lambda pair: (pair[1].step, _ORDER.index(pair[1].place), pair[0]))
    same = {rank for rank, f in found if (f.step, f.place, f.tensor) == (first.step, first.place, first.tensor)}
    return NonFiniteOrigin(
        step=first.step, ranks=tuple(sorted(same)), place=first.place, tensor=first.tensor, detail=first.detail
    )


def not_finite(step: int, loss: float | None, num_steps: int, origin: NonFiniteOrigin | None) -> Convergence:
    """The verdict on a run with a number that is not finite at ``step``; None where its loss is not recorded."""
    what = f"the loss is {loss}" if loss is not None else "the loss is not finite"
    sentences = [f"Diverged: {what} at step {step}, the first that is not finite."]
    if origin is not None:
        sentences.append(_origin_sentence(origin))
    sentences.append("Lower the learning rate or warm it up, and look at the images of that step.")
    return Convergence(
        verdict=ConvergenceVerdict.DIVERGED,
        sentence=" ".join(sentences),
        num_steps=num_steps,
        first_non_finite_step=step,
        non_finite=origin,
    )


def blown_up(
    cells: Series, cells_per_block: int, cell_steps: int, num_classes: int | None, *, last_two_count: bool, num: int
) -> Convergence | None:
    """Diverged without a number that is not finite, judged on blocks counted from the end; None if it has not.

    The last two block means are above three times the best mean of five consecutive blocks before (of all, where there
    are but two to four), or, where ``last_two_count`` says that both lie after the warmup, above
    ``2 ln(num_classes)``, twice the loss of guessing. Seven of their eight quarters are, too. Single blocks would cry
    wolf: small batches have losses of which few are huge and most are near 0, and the least of many such block
    means is well below a third of a usual one.
    """
    means = block_means(cells, cells_per_block)
    if len(means) < 3:
        return None
    quarters = np.sort(block_means(cells[-2 * cells_per_block :], cells_per_block // 4))
    last_two, current = min(float(means[-2:].min()), float(quarters[1])), float(means[-1])
    best = _best(means[:-2])
    guessing = math.log(max(num_classes, 2)) if num_classes else math.inf
    if last_two > DIVERGED_FACTOR * practical_size(max(best, 0.0)):
        why = f"the loss is {current:.4g}, over {DIVERGED_FACTOR:g} times its best of {best:.4g}"
    elif last_two_count and last_two > 2 * guessing:
        why = f"the loss is {current:.4g}, over twice the {guessing:.4g} of guessing"
    else:
        return None
    block_steps = cells_per_block * cell_steps
    return Convergence(
        verdict=ConvergenceVerdict.DIVERGED,
        sentence=f"Diverged: {why}, and has been for {2 * block_steps} steps. Lower the learning rate.",
        num_steps=num,
        current_loss=current,
        block_steps=block_steps,
        num_blocks=len(means),
    )


def _best(means: Series) -> float:
    """The least mean of five neighbours, or of all where they are fewer; infinite below two."""
    if len(means) < 2:
        return math.inf
    size = min(BEST_BLOCKS, len(means))
    return float(np.lib.stride_tricks.sliding_window_view(means / size, size).sum(axis=1).min())


def _origin_sentence(origin: NonFiniteOrigin) -> str:
    ranks = f"rank {origin.ranks[0]}" if len(origin.ranks) == 1 else f"ranks {', '.join(map(str, origin.ranks))}"
    where = {
        NonFinitePlace.PARAMETER: f"in the parameter {origin.tensor}",
        NonFinitePlace.RUNNING_STATISTICS: f"in the running statistics {origin.tensor}",
        NonFinitePlace.INPUT: "in the input",
        NonFinitePlace.ACTIVATION: f"in the output of {origin.tensor}",
        NonFinitePlace.LOSS: "in the loss itself",
        NonFinitePlace.OTHER_RANK: "in what came from another rank",
    }[origin.place]
    return f"It began {where}, on {ranks}."
