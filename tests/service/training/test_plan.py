"""Plans against what training really does."""

import math

import pytest
import torch

from service.jobs import AdamW, JobSpec, Mlp, Normalization, Precision, ResNet20
from service.training.dataset import load_dataset
from service.training.models import build_model
from service.training.plan import Impossible, plan
from syncbn import convert_sync_batchnorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog


def _spec(**fields: object) -> JobSpec:
    return JobSpec.model_validate({"name": "planned", "epochs": 2, **fields})


def _step(spec: JobSpec) -> tuple[int, int, int]:
    """Of a real step on this rank: exchanges, bytes that it contributes to them, parameters that it trains."""
    dataset = load_dataset(spec.data)
    model = convert_sync_batchnorm(build_model(spec.model, dataset.sample_shape, dataset.num_classes, 0.1))
    with CollectiveLog() as log:
        torch.autograd.backward(model(dataset.train_images[: spec.batch_size_per_worker]).sum())
    num_values = sum(collective.num_values for collective in log.collectives)
    return len(log.collectives), 8 * num_values, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", [Mlp(hidden_sizes=(8, 4)), ResNet20(width=4)])
def test_the_exchanges_of_a_plan_are_those_of_a_step(model: Mlp | ResNet20) -> None:
    spec = _spec(model=model.model_dump(), num_workers=2, batch_size_per_worker=4)
    planned = plan(spec)
    expected = (planned.exchanges_per_step, planned.exchange_bytes_per_step, planned.num_parameters)
    assert run_ranks(2, _step, spec) == [expected, expected]
    assert planned.gradient_bytes_per_step == 4 * planned.num_parameters


def test_a_layer_counts_the_values_behind_each_statistic() -> None:
    planned = plan(_spec(model=ResNet20(width=4).model_dump(), num_workers=4, batch_size_per_worker=2))
    assert len(planned.layers) == 19
    noise = math.sqrt(0.1 / 1.9 / 8)  # of means over 8 images; in one image all positions say the same, or sqrt(S) do
    assert planned.layers[0].model_dump() == pytest.approx(
        {
            "layer": "bn",
            "num_channels": 4,
            "positions_per_image": 64,
            "num_values": 8 * 64,
            "forward_bytes": 9 * 8,
            "backward_bytes": 8 * 8,
            "design_effect": 8.0,
            "batch_mean_error": 1 / 8,
            "running_mean_noise": noise / math.sqrt(8),
            "worst_noise": noise,
            "var_bias": -7 / 511,
        },
        rel=1e-9,
    )
    assert planned.lag_steps == pytest.approx(9.0)
    assert planned.layers[-1].positions_per_image == 4
    assert planned.exchange_bytes_per_step == sum(8 * (4 * layer.num_channels + 1) for layer in planned.layers)


def test_local_statistics_are_of_fewer_values_and_cost_no_exchange() -> None:
    planned = plan(_spec(normalization=Normalization.LOCAL, num_workers=4, batch_size_per_worker=2))
    assert (planned.exchanges_per_step, planned.exchange_bytes_per_step) == (0, 0)
    assert {layer.num_values for layer in planned.layers} == {2}
    assert {(warning.pointer, warning.code) for warning in planned.warnings} == {
        ("/batch_size_per_worker", "few_values"),
        ("/normalization", "statistics_differ"),
    }


def test_steps_are_counted_as_the_sampler_counts_them() -> None:
    planned = plan(_spec(epochs=3, num_workers=2, batch_size_per_worker=32))
    assert (planned.num_train_images, planned.steps_per_epoch, planned.total_steps) == (1437, 22, 66)
    assert plan(_spec(epochs=None, max_steps=7)).total_steps == 7


def test_a_short_run_is_told_that_its_statistics_stay_near_their_beginning() -> None:
    short, long = plan(_spec(epochs=None, max_steps=20)), plan(_spec(epochs=None, max_steps=29))
    assert "12% of the running statistics" in next(w.message for w in short.warnings)  # 0.9 ** 20 = 0.1216
    assert not long.warnings  # 0.9 ** 29 = 0.047
    assert "raise bn_momentum to 0.21" in short.warnings[0].message  # 1 - 0.01 ** (1 / 20) = 0.2057
    assert short.initial_weight == pytest.approx(0.9**20, rel=1e-9)


def test_noise_that_would_spoil_the_statistics_is_foretold_with_the_number_to_change() -> None:
    noisy = _spec(normalization=Normalization.LOCAL, num_workers=5, batch_size_per_worker=2, bn_momentum=0.5)
    warning = next(warning for warning in plan(noisy).warnings if warning.code == "statistics_too_noisy")
    assert warning.pointer == "/bn_momentum"
    assert "off by about 0.41 standard deviations" in warning.message  # sqrt(0.5 / 1.5 / 2)
    assert "lower bn_momentum to 0.14, or take 9 images" in warning.message  # 0.5 / 1.5 / 0.2 ** 2 = 8.3
    assert "normalization sync has them" in warning.message
    quiet = (noisy.model_copy(update={"bn_momentum": 0.14}), noisy.model_copy(update={"batch_size_per_worker": 9}))
    for spec in quiet:
        assert "statistics_too_noisy" not in {warning.code for warning in plan(spec).warnings}


def test_a_short_noisy_run_needs_images_and_not_another_momentum() -> None:
    planned = plan(_spec(epochs=None, max_steps=20, num_workers=1, batch_size_per_worker=2, bn_momentum=0.5))
    warning = next(warning for warning in planned.warnings if warning.code == "statistics_too_noisy")
    assert (warning.pointer, "take 9 images" in warning.message) == ("/batch_size_per_worker", True)


def test_a_plateau_that_would_end_a_run_before_its_learning_rate_falls_is_warned_of() -> None:
    codes = {
        (name, rule): {warning.code for warning in plan(_spec(schedule={"name": name}, stop_when=[rule])).warnings}
        for name in ("cosine", "constant")
        for rule in ("plateau", "diverged")
    }
    assert [key for key in codes if "plateau_before_decay" in codes[key]] == [("cosine", "plateau")]


def test_one_worker_exchanges_nothing() -> None:
    planned = plan(_spec(num_workers=1, batch_size_per_worker=64))
    assert (planned.exchange_bytes_per_step, planned.gradient_bytes_per_step) == (0, 0)


def test_what_training_would_refuse_is_refused_by_the_field() -> None:
    with pytest.raises(Impossible, match="1437 images, fewer than one global batch of 2000") as refused:
        plan(_spec(num_workers=2, batch_size_per_worker=1000))
    assert refused.value.pointer == "/batch_size_per_worker"


def test_double_parameters_have_double_gradients() -> None:
    spec = _spec(precision=Precision.FLOAT64, optimizer=AdamW().model_dump())
    planned = plan(spec)
    assert planned.gradient_bytes_per_step == 8 * planned.num_parameters
