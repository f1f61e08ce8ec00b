"""Says whether validation images look different from training images to the network."""

import math
from collections.abc import Iterator

from service.jobs import DataShift, Evaluation, FindingKind, JobFinding, Severity
from service.reports.findings import numbers

_WORTH_A_WORD = 0.1
"""Standard deviations or nats."""


def of_data(evaluation: Evaluation | None) -> Iterator[JobFinding]:
    """What the evaluation found to differ between its images and those of training.

    Amber, for whether the difference costs anything it does not tell: overfitting, too, sets the losses of both apart.
    """
    if evaluation is None or evaluation.data_shift is None or not evaluation.data_shift.moved:
        return
    shift = evaluation.data_shift
    yield JobFinding(
        kind=FindingKind.OTHER_DATA,
        severity=Severity.AMBER,
        sentence=f"Validation images look different from training images to layer {shift.layer}: {_difference(shift)}. "
        "No BatchNorm comes before it, so the images themselves differ: in brightness, contrast or noise.",
        layer=shift.layer,
        step=evaluation.step,
        evidence=numbers(
            rms_mean_shift=shift.rms_mean_shift,
            max_mean_shift=shift.max_mean_shift,
            max_mean_shift_channel=shift.max_mean_shift_channel,
            mean_log_var_ratio=shift.mean_log_var_ratio,
            mean_abs_log_var_ratio=shift.mean_abs_log_var_ratio,
            mean_p=shift.mean_p,
            var_p=shift.var_p,
        ),
        advice="Prepare validation images as training images are: same file format, scale and normalization; and draw "
        "both from one source. If they are to differ, train on images like those of validation.",
    )


def _difference(shift: DataShift) -> str:
    """Direction and size, of the means and of the spread, as far as each is worth a word."""
    parts = []
    if shift.rms_mean_shift >= _WORTH_A_WORD:
        direction = "higher" if shift.max_mean_shift_is_higher else "lower"
        parts.append(
            f"channel {shift.max_mean_shift_channel} is {shift.max_mean_shift:.2g} sd {direction} "
            f"({shift.rms_mean_shift:.2g} sd rms over all channels)"
        )
    if abs(shift.mean_log_var_ratio) >= _WORTH_A_WORD:
        parts.append(f"channels spread {math.exp(shift.mean_log_var_ratio / 2):.2g} times as wide")
    elif shift.mean_abs_log_var_ratio >= _WORTH_A_WORD:
        parts.append(f"a channel's variance differs by {shift.mean_abs_log_var_ratio:.2g} nats")
    return ", and ".join(parts)
