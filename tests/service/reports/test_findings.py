"""What is found of a job, how gravely, and what it says to change: from whole records."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs import (
    BatchNormSample,
    Drift,
    Evaluation,
    FindingKind,
    Interval,
    JobFinding,
    JobReport,
    JobSpec,
    JobState,
    LimitExceeded,
    ModeFault,
    ModeFaultKind,
    MomentumReplay,
    NonFinite,
    NonFinitePlace,
    ReplayedMomentum,
    Scores,
    Severity,
    SinceBest,
)
from service.reports import JobRecord, report_job
from tests.service.reports.records import (
    drift_of,
    evaluation_of,
    finding_of,
    layer_of,
    record_of,
    sample_of,
    sampled,
    spec_of,
)

OLD: dict[str, Any] = {"initial_weight": 0.0, "expected_mean_shift": 0.03}


def _found(record: JobRecord) -> list[tuple[FindingKind, Severity]]:
    return [(finding.kind, finding.severity) for finding in report_job(record).findings]


def _only(record: JobRecord, kind: FindingKind) -> JobFinding:
    (finding,) = [finding for finding in report_job(record).findings if finding.kind is kind]
    return finding


def _replay(better: float) -> MomentumReplay:
    candidates = (
        ReplayedMomentum(momentum=0.1, rms_mean_shift=0.3, output_error=0.3),
        ReplayedMomentum(momentum=better, rms_mean_shift=0.02, output_error=0.02),
    )
    return MomentumReplay(step=500, num_steps=400, used=0.1, best=better, candidates=candidates)


def test_of_a_healthy_job_nothing_is_found() -> None:
    report = report_job(
        record_of(
            evaluations=[evaluation_of()],
            drift=[drift_of(0.02, **OLD)],
            samples=sampled(sample_of(finding_of(0, 2.0, 0.3), finding_of(1, -1.0, 0.1))),
            momentum_replay=_replay(0.03),
        )
    )
    assert [finding.kind for finding in report.findings if finding.severity is not Severity.NOTE] == []
    assert report.advice == ()


def test_damage_names_what_recomputing_gains_and_the_step() -> None:
    record = record_of(evaluations=[evaluation_of(0.2)])
    finding = _only(record, FindingKind.DAMAGE)
    assert (finding.severity, finding.step, finding.evidence["loss_damage"]) == (Severity.RED, 500, 0.2)
    assert "recompute_bn" in finding.advice
    assert "0.6 to 0.4" in finding.advice
    held = _only(record_of(spec_of(recompute_bn=True), evaluations=[evaluation_of(0.2)]), FindingKind.DAMAGE)
    assert "service.training.ship" in held.advice


def test_of_a_broken_network_no_gain_by_recomputing_is_promised() -> None:
    broken = Scores(loss=math.nan, accuracy=0.1)
    evaluation = evaluation_of(math.nan, stored=broken, population=broken)
    record = record_of(losses=(0.5,) * 100 + (math.nan,), evaluations=[evaluation], drift=[drift_of(math.nan, **OLD)])
    assert _found(record) == [(FindingKind.NON_FINITE, Severity.RED), (FindingKind.DAMAGE, Severity.RED)]
    assert report_job(record).advice == ("Lower the learning rate or warm it up.",)


def test_a_bootstrap_interval_goes_before_the_normal_one() -> None:
    """0.02 +- 0.002 counts; by the bootstrap it may be nothing."""
    evaluation = evaluation_of(0.02)
    assert (FindingKind.DAMAGE, Severity.AMBER) in _found(record_of(evaluations=[evaluation]))
    wide = evaluation.model_copy(update={"loss_damage_interval": Interval(low=-0.001, high=0.018)})
    report = report_job(record_of(evaluations=[wide]))
    assert (report.drift.loss_damage_low, report.drift.loss_damage_high) == (-0.001, 0.018)
    assert not report.findings


@pytest.mark.parametrize(
    ("fields", "drift", "kind", "words"),
    [
        # 0.999^500 = 0.606 of the start is left; 1 % is left with 1 - 0.01^(1/500) = 0.0092
        ({"bn_momentum": 0.001}, drift_of(0.5), FindingKind.STATISTICS_YOUNG, "from 0.001 to at least 0.0092"),
        ({}, drift_of(0.5, initial_weight=0.3, step=20), FindingKind.STATISTICS_YOUNG, "to at least 0.21"),
        ({"bn_momentum": 0.9}, drift_of(0.5, initial_weight=0.3), FindingKind.STATISTICS_YOUNG, "too few batches"),
        # 0.05 sd over 4 images: 2 * 0.01 / 1.01 = 0.0198
        (
            {"bn_momentum": 0.9, "batch_size_per_worker": 2},
            drift_of(0.4, expected_mean_shift=0.45, initial_weight=0.0),
            FindingKind.STATISTICS_NOISY,
            "Lower bn_momentum from 0.9 to 0.02, or normalize over more than 4 images",
        ),
        # with 20 steps 0.01^(1/20) asks for 0.21 at least
        (
            {"batch_size_per_worker": 2},
            drift_of(0.4, expected_mean_shift=0.45, initial_weight=0.0, step=20),
            FindingKind.STATISTICS_NOISY,
            "To calm the statistics, normalize over more than 4 images",
        ),
        ({}, drift_of(0.4, **OLD), FindingKind.STATISTICS_LAG, "trail by about 9 steps at bn_momentum 0.1"),
    ],
)
def test_stale_statistics_are_told_with_the_cause_and_the_number_to_set(
    fields: dict[str, Any], drift: Drift, kind: FindingKind, words: str
) -> None:
    finding = _only(record_of(spec_of(**fields), evaluations=[evaluation_of(0.3)], drift=[drift]), kind)
    assert (finding.severity, finding.layer, finding.step) == (Severity.RED, "layers.0", drift.step)
    assert words in finding.advice


def test_a_replayed_momentum_is_advised_once_in_place_of_a_reckoned_one() -> None:
    record = record_of(evaluations=[evaluation_of(0.3)], drift=[drift_of(0.4, **OLD)], momentum_replay=_replay(0.03))
    assert report_job(record).advice[1:] == ("Set bn_momentum to 0.03.",)
    harmless = record_of(evaluations=[evaluation_of()], drift=[drift_of(0.04, **OLD)], momentum_replay=_replay(0.03))
    assert _found(harmless) == [(FindingKind.MOMENTUM, Severity.NOTE)]
    assert report_job(harmless).advice == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size_per_worker": 2}, "batch_size_per_worker to at least 4"),
        ({"normalization": "local", "batch_size_per_worker": 2}, "sync, over 4 images, or raise batch_size_per_worker"),
        ({"normalization": "local", "batch_size_per_worker": 2, "num_workers": 1}, "at least 8."),
        ({"normalization": "local", "batch_size_per_worker": 2, "num_workers": 8}, "or set normalization to sync, ov"),
    ],
)
def test_few_images_are_told_where_the_network_is_poor_at_its_end(fields: dict[str, Any], words: str) -> None:
    facts: dict[str, Any] = {"evaluations": [evaluation_of(loss=2.0, accuracy=0.3)]}
    assert words in _only(record_of(spec_of(**fields), **facts), FindingKind.FEW_IMAGES).advice
    assert (FindingKind.POOR_NETWORK, Severity.AMBER) in _found(record_of(spec_of(**fields), **facts))
    assert not _found(record_of(spec_of(**fields), JobState.RUNNING, **facts))


def test_each_rank_that_differs_is_a_finding_of_its_own() -> None:
    spec = spec_of(num_workers=4)
    sample = sample_of(
        finding_of(0, 2.0, 0.3),
        finding_of(1, 6.0, 0.05),
        finding_of(2, -9.0, -0.7),
        repeating_ranks=(3,),
        differing_ranks={"layers.0": (1,)},
    )
    found = report_job(record_of(spec, samples=sampled(sample))).findings
    assert [(f.kind, f.severity, f.rank) for f in found] == [
        (FindingKind.BUFFERS_DIFFER, Severity.RED, 1),
        (FindingKind.RANK_REPEATS, Severity.RED, 3),
        (FindingKind.RANK_DIFFERS, Severity.RED, 2),
        (FindingKind.RANK_DIFFERS, Severity.AMBER, 1),
    ]
    assert (found[2].layer, found[2].evidence["size"], found[2].step) == ("layers.0", -0.7, 400)
    apart = _only(record_of(spec, drift=[drift_of(0.01, **OLD, rank_disagreement=0.2)]), FindingKind.BUFFERS_DIFFER)
    assert (apart.rank, apart.layer, apart.evidence["rank_disagreement"]) == (None, "layers.0", 0.2)


def test_a_number_that_is_not_finite_is_found_with_tensor_rank_and_step() -> None:
    facts = [
        (0, NonFinite(step=251, place=NonFinitePlace.OTHER_RANK, tensor="")),
        (1, NonFinite(step=251, place=NonFinitePlace.ACTIVATION, tensor="layers.2")),
    ]
    finding = _only(record_of(losses=(0.5,) * 250 + (math.nan,), non_finite=facts), FindingKind.NON_FINITE)
    assert (finding.severity, finding.layer, finding.rank, finding.step) == (Severity.RED, "layers.2", 1, 251)
    assert "Lower the learning rate" in finding.advice


def test_the_layer_that_changed_first_is_named_where_a_run_diverged() -> None:
    """25 samples, of which the last ten of layers.1 and the last five of layers.0 are a thousand times as large."""
    drift = [
        drift_of(*(0.01 * (1 + 0.1 * math.sin(i)) * (1000 if i >= since else 1) for since in (35, 30)), step=10 * i)
        for i in range(40)
    ]
    record = record_of(losses=(0.5,) * 395 + (math.nan,), drift=drift)
    finding = _only(record, FindingKind.FIRST_TO_CHANGE)
    assert (finding.layer, finding.step, finding.severity) == ("layers.1", 300, Severity.NOTE)
    assert report_job(record_of(drift=drift)).first_to_change is None


@pytest.mark.parametrize(
    ("losses", "kind", "severity"),
    [
        ((0.5,) * 250 + (5.0,) * 100, FindingKind.DIVERGED, Severity.RED),
        (tuple(0.5 + i / 250 + 0.01 * math.sin(7 * i) for i in range(250)), FindingKind.WORSENING, Severity.AMBER),
    ],
)
def test_losses_that_go_wrong_are_found(losses: tuple[float, ...], kind: FindingKind, severity: Severity) -> None:
    assert _only(record_of(losses=losses), kind).severity is severity


def test_overfitting_names_the_step_to_stop_at() -> None:
    since = SinceBest(best_step=200, best_loss=0.4, rise=0.2, interval=Interval(low=0.15, high=0.25))
    evaluations = [
        evaluation_of(step=200, train=Scores(loss=0.3, accuracy=0.95)),
        evaluation_of(loss=0.6, train=Scores(loss=0.1, accuracy=0.99), since_best=since),
    ]
    finding = _only(record_of(evaluations=evaluations), FindingKind.OVERFITTING)
    assert (finding.severity, finding.step) == (Severity.AMBER, 200)
    assert "Stop at step 200" in finding.advice


@pytest.mark.parametrize("kind", ModeFaultKind)
def test_a_mode_fault_is_proof_and_told_once_a_layer(kind: ModeFaultKind) -> None:
    faults = [ModeFault(step=step, kind=kind, layer="norm1", detail="it stays") for step in (20, 40)]
    finding = _only(record_of(mode_faults=faults), FindingKind(kind.value))
    assert (finding.severity, finding.layer, finding.step) == (Severity.RED, "norm1", 20)
    assert finding.evidence == {"num_times": 2.0}
    assert finding.advice


@pytest.mark.parametrize("action", ["report", "alert", "pause", "recompute"])
def test_a_limit_is_told_once_as_it_was_last_exceeded(action: Any) -> None:
    events = [
        LimitExceeded(
            step=step, limit=1, layer="norm1", metric="output_error", value=step / 100, above=0.1, action=action
        )
        for step in (20, 40)
    ]
    finding = _only(record_of(limits_exceeded=events), FindingKind.DRIFT_LIMIT)
    assert (finding.severity, finding.step, finding.evidence["value"]) == (Severity.AMBER, 40, 0.4)


@pytest.mark.parametrize(
    ("states", "kind", "severity"),
    [
        ({"dead": (1,)}, FindingKind.DEAD_CHANNELS, Severity.AMBER),
        ({"collapsed": (1, 2)}, FindingKind.COLLAPSED_CHANNELS, Severity.AMBER),
        ({"exploding": (1,)}, FindingKind.EXPLODING_CHANNELS, Severity.RED),
        ({"muted": (1,)}, FindingKind.MUTED_CHANNELS, Severity.AMBER),
    ],
)
def test_channels_are_found_with_their_layer(states: dict[str, Any], kind: FindingKind, severity: Severity) -> None:
    finding = _only(record_of(samples=sampled(*[sample_of(layers=(layer_of(**states),))] * 3)), kind)
    assert (finding.severity, finding.layer) == (severity, "layers.0")
    assert f"{len(next(iter(states.values())))} of 10 channels" in finding.sentence
    few = layer_of(**states).model_copy(update={"num_channels": 100})
    note = _only(record_of(samples=sampled(*[sample_of(layers=(few,))] * 3)), kind)
    assert note.severity is (Severity.AMBER if kind is FindingKind.EXPLODING_CHANNELS else Severity.NOTE)


_ANY = st.floats()
_EVALUATIONS = st.builds(
    Evaluation,
    step=st.integers(0, 1000),
    epoch=st.just(1),
    num_images=st.integers(0, 1000),
    stored=st.builds(Scores, loss=_ANY, accuracy=_ANY),
    population=st.builds(Scores, loss=_ANY, accuracy=_ANY),
    loss_damage=_ANY,
    loss_damage_se=_ANY,
    accuracy_damage=_ANY,
    accuracy_damage_se=_ANY,
    loss_damage_interval=st.none() | st.builds(Interval, low=_ANY, high=_ANY),
    train=st.none() | st.builds(Scores, loss=_ANY, accuracy=_ANY),
)
_MAYBE = st.none() | _ANY
_DRIFT = st.builds(
    drift_of,
    _ANY,
    step=st.integers(0, 1000),
    rank_disagreement=_ANY,
    initial_weight=_MAYBE,
    lag_steps=_MAYBE,
    max_abs_z=_MAYBE,
    z_threshold=_MAYBE,
    expected_mean_shift=_MAYBE,
)
_SAMPLES = st.builds(
    sample_of,
    st.builds(finding_of, st.integers(0, 1), _ANY, _ANY, st.sampled_from(["mean", "variance"]), threshold=_ANY),
    repeating_ranks=st.sampled_from([(), (1,)]),
)
_SPECS = st.builds(
    spec_of,
    normalization=st.sampled_from(["sync", "local"]),
    batch_size_per_worker=st.integers(2, 64),
    bn_momentum=st.floats(0, 1, exclude_min=True),
)
_REPLAYS = st.builds(
    lambda used, best: MomentumReplay(
        step=1,
        num_steps=1,
        used=0.1,
        best=0.2,
        candidates=(
            ReplayedMomentum(momentum=0.1, rms_mean_shift=used, output_error=best),
            ReplayedMomentum(momentum=0.2, rms_mean_shift=best, output_error=used),
        ),
    ),
    _ANY,
    _ANY,
)


@settings(max_examples=60, deadline=None)
@given(
    _SPECS,
    st.lists(_ANY, max_size=5),
    st.lists(_EVALUATIONS, max_size=2),
    st.lists(_DRIFT, max_size=2),
    st.lists(_SAMPLES, max_size=2),
    st.none() | _REPLAYS,
    st.sampled_from(JobState),
)
def test_any_record_gets_a_report(
    spec: JobSpec,
    losses: list[float],
    evaluations: list[Evaluation],
    drift: list[Drift],
    samples: list[BatchNormSample],
    replay: MomentumReplay | None,
    state: JobState,
) -> None:
    record = record_of(
        spec,
        state,
        losses=tuple(losses),
        evaluations=evaluations,
        drift=drift,
        samples=sampled(*samples),
        momentum_replay=replay,
    )
    report = report_job(record)
    assert JobReport.model_validate_json(report.model_dump_json()).findings is not None
    assert all(finding.sentence for finding in report.findings)
    assert len(set(report.advice)) == len(report.advice)
