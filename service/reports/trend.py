"""Says how a training loss moves: improving, at a plateau, worsening, stuck at guessing, or not to be told yet."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from service.jobs import Convergence, ConvergenceVerdict
from service.reports.blocks import Series, Trend, block_means, fit_trend, residual_correlation
from service.reports.margins import practical_size

NUM_BLOCKS = 10
MAX_CORRELATION = 0.3
"""Above this, neighbours are not taken as independent and blocks must grow."""
PRACTICAL_SHARE = 0.01
STUCK_SHARE = 0.02


@dataclass(frozen=True)
class Window:
    """The last ten blocks of a series, as large as they must be for their means to be independent.

    ``means`` is None where the series is too short for ten blocks of ``cells_per_block``. ``correlation`` is that of
    quarter-block means, at the last size that was tried: there are four times as many, so that it is known better,
    and whole blocks depend on each other still less.
    """

    means: Series | None
    cells_per_block: int
    correlation: float | None


def last_window(cells: Series, cells_per_block: int) -> Window:
    """Double the block, a multiple of four cells, until its means may be taken as independent, or the cells run out."""
    correlation = None
    while len(cells) >= NUM_BLOCKS * cells_per_block:
        window = cells[-NUM_BLOCKS * cells_per_block :]
        correlation = residual_correlation(block_means(window, cells_per_block // 4))
        if correlation < MAX_CORRELATION:
            return Window(block_means(window, cells_per_block), cells_per_block, correlation)
        cells_per_block *= 2
    return Window(None, cells_per_block, correlation)


def judge_window(
    means: Series, num_steps: int, block_steps: int, correlation: float | None = None, guessing: float | None = None
) -> Convergence:
    """The verdict on ten block means; stuck only where ``guessing``, the loss of guessing in nats, is given.

    A loss at that of guessing that falls for sure, by however little, is not stuck.
    """
    trend, current = fit_trend(means), float(means[-1])
    margin = PRACTICAL_SHARE * practical_size(abs(current))
    verdict = _verdict(trend, margin)
    if guessing is not None and trend.high >= 0 and _rests_at(means, guessing):
        verdict = ConvergenceVerdict.STUCK
    return Convergence(
        verdict=verdict,
        sentence=_sentence(verdict, trend, current, margin, NUM_BLOCKS * block_steps, guessing),
        num_steps=num_steps,
        current_loss=current,
        slope=trend.change,
        slope_low=trend.low,
        slope_high=trend.high,
        margin=margin,
        block_steps=block_steps,
        num_blocks=NUM_BLOCKS,
        block_correlation=correlation,
    )


def _verdict(trend: Trend, margin: float) -> ConvergenceVerdict:
    if trend.high < -margin:
        return ConvergenceVerdict.IMPROVING
    if trend.low > margin:
        return ConvergenceVerdict.WORSENING
    inside = -margin <= trend.low and trend.high <= margin
    return ConvergenceVerdict.PLATEAU if inside else ConvergenceVerdict.UNDECIDED


def _rests_at(means: Series, loss: float) -> bool:
    """Whether the mean of the blocks is shown, by its 95 % interval, to be within 2 % of ``loss``."""
    if float(np.abs(means - loss).max()) > loss:
        return False
    half_width = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    return abs(float(means.mean()) - loss) + half_width <= STUCK_SHARE * loss


def _sentence(
    verdict: ConvergenceVerdict, trend: Trend, current: float, margin: float, window: int, guessing: float | None
) -> str:
    change = f"{trend.change:+.3g} nats (95 % interval {trend.low:+.3g} to {trend.high:+.3g})"
    over = f"over the last {window} steps the training loss changed by {change}, to {current:.4g}"
    match verdict:
        case ConvergenceVerdict.IMPROVING:
            return f"Still improving: {over}. More steps should lower it further."
        case ConvergenceVerdict.WORSENING:
            return f"Worsening: {over}. Lower the learning rate, or go back to an earlier checkpoint."
        case ConvergenceVerdict.PLATEAU:
            return f"At a plateau: {over}; less than {margin:.3g} either way does not matter."
        case ConvergenceVerdict.STUCK:
            return (
                f"Stuck: {over}, and guessing gives {guessing:.4g}. Nothing is learned: raise the learning rate "
                "tenfold, or look whether the labels belong to the images."
            )
        case _:
            return f"Undecided: {over}; that interval does not tell whether it moves by more than {margin:.3g}."
