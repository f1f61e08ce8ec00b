"""Says where a training loss is going, while it comes in or all at once."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from service.jobs import Convergence, ConvergenceVerdict, Decay, NonFinite
from service.reports.blocks import Series, block_means
from service.reports.cells import CellMeans, Steps
from service.reports.decay import fit_stretch, stretch_of
from service.reports.divergence import blown_up, find_origin, not_finite
from service.reports.trend import NUM_BLOCKS, Window, judge_window, last_window

MIN_BLOCK = 20
STUCK_AFTER = 0.2
"""Share of the steps. Before it, a loss at that of guessing is no bad sign."""


class LossCourse:
    """The training losses of one run as they come in, in constant memory, and what they show.

    `verdict` is the one of `judge_convergence` on the same losses, however they were cut in pieces. A step that is not
    above the one before says that the run was resumed there: what was told from that step on is forgotten, and
    with it up to one 200th of the steps before, those that share a cell with forgotten ones.

    ``num_classes`` places the loss of guessing and ``total_steps`` the budget; without them less is judged.
    Cost: at most 400 means a run; 0.02 ms a call of `add` and 0.4 microseconds a loss.
    """

    def __init__(
        self, num_classes: int | None = None, *, warmup_steps: int = 0, total_steps: int | None = None
    ) -> None:
        self._cells = CellMeans()
        self._num_classes = num_classes
        self._warmup_steps = warmup_steps
        self._total_steps = total_steps
        self._not_finite: tuple[int, float] | None = None

    def add(self, steps: int | Sequence[int], losses: float | Sequence[float]) -> None:
        """Take one loss, or several in the order in which they came, with the steps at which they were.

        Raises: ValueError where ``steps`` and ``losses`` differ in length.
        """
        at, values = np.atleast_1d(np.asarray(steps, np.int64)), np.atleast_1d(np.asarray(losses, np.float64))
        if len(at) != len(values):
            raise ValueError(f"{len(at)} steps for {len(values)} losses; give one for each")
        resumed = np.flatnonzero(np.diff(at) <= 0) + 1
        for some_steps, some in zip(np.split(at, resumed), np.split(values, resumed), strict=True):
            if len(some):
                self._take(some_steps, some)

    def verdict(self, non_finite: Iterable[tuple[int, NonFinite]] = ()) -> Convergence:
        """Where the loss is going as of now; ``non_finite`` are findings of ranks, as pairs with the rank."""
        facts, last = list(non_finite), self._cells.last_step
        if self._not_finite:
            step, loss = self._not_finite
            return not_finite(step, loss, self._cells.num_values, find_origin(facts, step))
        ahead = find_origin((rank, fact) for rank, fact in facts if last is None or fact.step > last)
        if ahead:
            return not_finite(ahead.step, None, self._cells.num_values, ahead)
        if last is None:
            return _nothing_yet()
        return self._blown_up() or self._moving(self._cells.means)

    def lasting_verdict(self, non_finite: Iterable[tuple[int, NonFinite]] = ()) -> Convergence:
        """The verdict to act by while the run goes on: it may be asked for at any time and as often as one likes.

        A plateau counts only if the window before the present one was a plateau too, with a mean within the margin of
        the present one's; worsening only by an interval three times as wide. Both are else undecided. Other verdicts
        are those of `verdict`.

        Measured over runs of 3,000 to 4,000 steps, looked at whenever a 20th more were taken: a plateau was called in
        none of 900 runs that still fell by more than the margin in the next window; worsening in 3 and 5 of 150 flat
        runs of correlation 0.9 and 0.97; divergence in none of 600 flat runs, and in at most 3 of 100 with the rare
        huge losses of small batches (gamma noise of shape 0.2 and 0.05). What a later change of the learning rate
        would bring, no plateau can know.
        """
        verdict = self.verdict(non_finite)
        match verdict.verdict:
            case ConvergenceVerdict.PLATEAU if not self._was_plateau(verdict):
                doubt = "Undecided: the loss has come to rest, but not yet for two windows in a row. "
            case ConvergenceVerdict.WORSENING if not _surely_worse(verdict):
                doubt = "Undecided: the loss rises, but not more than it may by chance in one of many looks. "
            case _:
                return verdict
        return verdict.model_copy(
            update={"verdict": ConvergenceVerdict.UNDECIDED, "sentence": doubt + verdict.sentence}
        )

    def decay(self) -> Decay:
        """The law by which the loss falls; see `service.reports.decay.fit_stretch`."""
        if self._not_finite:
            step, num = self._not_finite[0], self._cells.num_values
            return Decay(law=None, sentence=f"No law is told: the loss of step {step} is not finite.", num_steps=num)
        return fit_stretch(stretch_of(self._cells, self._warmup_steps))

    @property
    def _cells_per_block(self) -> int:
        """The fewest of 4, 8, 16 ... cells that hold 20 steps and one 50th of all."""
        block = 4
        while block * self._cells.width < max(MIN_BLOCK, self._cells.num_values / 50):
            block *= 2
        return block

    def _take(self, steps: Steps, values: Series) -> None:
        first, last = int(steps[0]), self._cells.last_step
        if last is not None and first <= last:
            self._cells.forget_from(first)
            if self._not_finite and self._not_finite[0] >= first:
                self._not_finite = None
        bad = np.flatnonzero(~np.isfinite(values))
        if self._not_finite is None and len(bad):
            self._not_finite = int(steps[bad[0]]), float(values[bad[0]])
        self._cells.extend(steps, values)

    def _blown_up(self) -> Convergence | None:
        cells, block = self._cells, self._cells_per_block
        started = cells.first_steps[-2 * block :]
        return blown_up(
            cells.means,
            block,
            cells.width,
            self._num_classes,
            last_two_count=len(started) == 2 * block and int(started[0]) > self._warmup_steps,
            num=cells.num_values,
        )

    def _moving(self, means: Series) -> Convergence:
        window = last_window(means, self._cells_per_block)
        if window.means is None:
            return self._too_few(window)
        block_steps = window.cells_per_block * self._cells.width
        return judge_window(window.means, self._cells.num_values, block_steps, window.correlation, self._guessing())

    def _was_plateau(self, now: Convergence) -> bool:
        """Whether the window before the present one, of the same blocks, was a plateau at the same loss."""
        assert now.block_steps is not None
        assert now.margin is not None
        cells_per_block = now.block_steps // self._cells.width
        size = NUM_BLOCKS * cells_per_block
        means = self._cells.means
        before = last_window(means[:-size], cells_per_block)
        if before.means is None:
            return False
        earlier = judge_window(before.means, 0, before.cells_per_block * self._cells.width)
        level, level_before = float(block_means(means, size)[-1]), float(before.means.mean())
        return earlier.verdict is ConvergenceVerdict.PLATEAU and abs(level_before - level) <= now.margin

    def _guessing(self) -> float | None:
        """The loss of guessing, once it would be a bad sign."""
        last, total = self._cells.last_step, self._total_steps
        if not self._num_classes or total is None or last is None or last < STUCK_AFTER * total:
            return None
        return math.log(max(self._num_classes, 2))

    def _too_few(self, window: Window) -> Convergence:
        num, steps = self._cells.num_values, window.cells_per_block * self._cells.width
        why = f"Undecided: {num} steps are recorded and {NUM_BLOCKS * steps} are needed, {NUM_BLOCKS} blocks of {steps}"
        if window.correlation is not None:
            why += (
                f"; the loss remembers too long for smaller blocks (correlation {window.correlation:.2f} at "
                f"{steps // 8} steps)"
            )
        return Convergence(
            verdict=ConvergenceVerdict.UNDECIDED,
            sentence=why + ".",
            num_steps=num,
            current_loss=self._cells.mean_of_last(),
            block_steps=steps,
            num_blocks=len(self._cells.means) // window.cells_per_block,
            block_correlation=window.correlation,
        )


def judge_convergence(
    steps: Sequence[int],
    losses: Sequence[float],
    num_classes: int | None = None,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    non_finite: Iterable[tuple[int, NonFinite]] = (),
) -> Convergence:
    """The verdict on a series of training losses, one a step; where a step comes twice its last loss counts.

    *Diverged*: any loss that is not finite; or the last two block means above three times the best five; or both
    above ``2 ln(num_classes)``, twice the loss of guessing, after ``warmup_steps`` (skipped without a
    ``num_classes``). Otherwise a line through the means of the last 10 blocks decides, by its 95 % interval
    against a margin of 1 % of the current loss: *improving* wholly below, *worsening* wholly above, *plateau*
    wholly inside (two one-sided tests: "not significant" is no plateau), *undecided* else. *Stuck* instead of the
    last three: after a fifth of ``total_steps``, the mean of those blocks is shown to be within 2 % of the loss of
    guessing, and no fall is shown. A block is the smallest of 20, 40, 80 ... steps that is a 50th of all, and is
    doubled until neighbouring means are no longer correlated.

    Measured on 1,000 fresh series for each of 16 kinds of flat AR(1) noise of sd 0.2 around 1 (correlation 0, 0.5,
    0.9, 0.97; 200, 500, 1,000, 4,000 steps): in the worst kind 3.8 % wrongly *improving*, 3.5 % *worsening*, none
    *diverged*. The price is *undecided* where the noise is large or its memory long. These are rates of one look:
    to act while a run goes on, ask `LossCourse.lasting_verdict`.

    Units: losses and margins in nats. Cost: O(n log n).
    Raises: ValueError where ``steps`` and ``losses`` differ in length.
    Source: block means as in Law and Carson 1979; equivalence as in Schuirmann 1987.
    """
    latest = dict(zip(steps, losses, strict=True))
    course = LossCourse(num_classes, warmup_steps=warmup_steps, total_steps=total_steps)
    kept = sorted(latest)
    course.add(kept, [latest[step] for step in kept])
    return course.verdict(non_finite)


def _nothing_yet() -> Convergence:
    return Convergence(
        verdict=ConvergenceVerdict.UNDECIDED,
        sentence=f"Undecided: no training step is recorded yet; {NUM_BLOCKS * MIN_BLOCK} are needed.",
        num_steps=0,
    )


def _surely_worse(verdict: Convergence) -> bool:
    assert verdict.slope is not None
    assert verdict.slope_low is not None
    assert verdict.margin is not None
    return verdict.slope - 3 * (verdict.slope - verdict.slope_low) > verdict.margin
