"""Evaluations for tests of what is judged from them."""

from service.jobs import Evaluation, Interval, Scores, SinceBest


def evaluated(
    step: int,
    *,
    accuracy: float = 0.5,
    loss: float = 1.0,
    train: float | None = None,
    best: tuple[int, float, float, float] | None = None,
) -> Evaluation:
    """One evaluation whose stored and population scores agree.

    ``best`` is the step of the best one before, the rise since then, and the two ends of its 95 % interval.
    """
    scores = Scores(loss=loss, accuracy=accuracy)
    return Evaluation(
        step=step,
        epoch=1,
        num_images=1000,
        stored=scores,
        population=scores,
        loss_damage=0.0,
        loss_damage_se=0.0,
        accuracy_damage=0.0,
        accuracy_damage_se=0.0,
        train=None if train is None else Scores(loss=train, accuracy=0.9),
        since_best=None
        if best is None
        else SinceBest(
            best_step=best[0], best_loss=loss - best[1], rise=best[1], interval=Interval(low=best[2], high=best[3])
        ),
    )
