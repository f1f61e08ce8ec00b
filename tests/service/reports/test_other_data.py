import pytest

from service.jobs import DataShift, FindingKind, Severity
from service.reports import report_job
from tests.service.reports.records import evaluation_of, record_of


def _shift(**fields: object) -> DataShift:
    values: dict[str, object] = {
        "layer": "norm1",
        "rms_mean_shift": 0.5,
        "max_mean_shift": 1.23,
        "max_mean_shift_channel": 5,
        "max_mean_shift_is_higher": True,
        "mean_log_var_ratio": 0.02,
        "mean_abs_log_var_ratio": 0.04,
        "mean_p": 1e-9,
        "var_p": 0.5,
        "moved": True,
    }
    return DataShift.model_validate(values | fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "norm1: channel 5 is 1.2 sd higher (0.5 sd rms over all channels). No BatchNorm"),
        ({"max_mean_shift_is_higher": False}, "channel 5 is 1.2 sd lower"),
        # exp(0.8 / 2) = 1.49
        (
            {"mean_log_var_ratio": 0.8, "mean_abs_log_var_ratio": 0.8},
            "all channels), and channels spread 1.5 times as wide. No",
        ),
        (
            {"rms_mean_shift": 0.05, "mean_log_var_ratio": -0.2, "mean_abs_log_var_ratio": 0.3},
            "norm1: channels spread 0.9 times as wide. No",
        ),
        (
            {"rms_mean_shift": 0.05, "mean_log_var_ratio": 0.01, "mean_abs_log_var_ratio": 0.3},
            "norm1: a channel's variance differs by 0.3 nats. No",
        ),
    ],
)
def test_other_data_are_told_with_direction_and_size(fields: dict[str, object], words: str) -> None:
    report = report_job(record_of(evaluations=(evaluation_of(data_shift=_shift(**fields)),)))
    (finding,) = report.findings
    assert (finding.kind, finding.severity) == (FindingKind.OTHER_DATA, Severity.AMBER)
    assert (finding.layer, finding.step) == ("norm1", 500)
    assert words in finding.sentence
    assert finding.evidence["mean_p"] == 1e-9
    assert report.advice == (finding.advice,)
    assert "Prepare validation images as training images are" in finding.advice


def test_the_last_evaluation_alone_tells_of_other_data() -> None:
    earlier = evaluation_of(step=400, data_shift=_shift())
    for last in (evaluation_of(data_shift=_shift(moved=False)), evaluation_of()):
        assert report_job(record_of(evaluations=(earlier, last))).findings == ()
