"""JobSpec: what is accepted, what is refused, and that all that is wrong is said at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.jobs import AdamW, JobSpec, Mlp, Normalization, ResNet20

LEGAL: dict[str, Any] = {"name": "digits", "epochs": 1}


def pointers(fields: dict[str, Any]) -> dict[str, str]:
    """Where a spec is wrong, and what is said of each place."""
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(fields)
    return {"/" + "/".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


def test_a_name_and_a_length_are_all_that_is_needed() -> None:
    spec = JobSpec.model_validate(LEGAL)
    assert (spec.model, spec.data, spec.normalization) == (Mlp(), "builtin:digits", Normalization.SYNC)
    assert (spec.num_workers, spec.global_batch_size) == (2, 64)


def test_a_spec_survives_json_unchanged() -> None:
    spec = JobSpec(name="all", model=ResNet20(width=8), optimizer=AdamW(), max_steps=7, data="idx:/images")
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_every_wrong_field_is_named_at_once_also_the_impossible_combinations() -> None:
    wrong = pointers(
        {
            "name": "x",
            "num_worker": 3,
            "seed": "seven",
            "data": "builtin:imagenet",
            "num_workers": 1,
            "batch_size_per_worker": 1,
            "optimizer": {"name": "sgd", "momentum": 0, "nesterov": True},
        }
    )
    assert set(wrong) == {"/num_worker", "/seed", "/data", "/batch_size_per_worker", "/optimizer/nesterov", "/epochs"}
    assert "builtin:digits" in wrong["/data"]
    assert "at least 2" in wrong["/batch_size_per_worker"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"epochs": 2, "max_steps": 10}, "/epochs"),
        ({"data": "idx:relative/path"}, "/data"),
        ({"data": "idx:"}, "/data"),
        ({"model": {"name": "vgg"}}, "/model"),
        ({"model": {"name": "mlp", "hidden_sizes": []}}, "/model/mlp/hidden_sizes"),
        ({"normalization": "local", "batch_size_per_worker": 1}, "/batch_size_per_worker"),
        ({"optimizer": {"name": "sgd", "learning_rate": float("nan")}}, "/optimizer/sgd/learning_rate"),
        ({"epochs": None, "max_steps": 5, "schedule": {"warmup_steps": 5}}, "/schedule/warmup_steps"),
        ({"num_workers": 0}, "/num_workers"),
        ({"name": "line\nbreak"}, "/name"),
        ({"precision": "float16"}, "/precision"),
    ],
)
def test_an_impossible_value_is_refused_by_its_pointer(change: dict[str, Any], pointer: str) -> None:
    assert pointer in pointers(LEGAL | change)


def test_batch_one_is_possible_where_statistics_have_more_than_one_value() -> None:
    assert JobSpec(name="two", epochs=1, num_workers=2, batch_size_per_worker=1).normalization_batch_size == 2
    assert JobSpec(name="conv", epochs=1, num_workers=1, batch_size_per_worker=1, model=ResNet20())


def test_a_spec_cannot_be_changed_after_its_checks() -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate(LEGAL).num_workers = 9  # type: ignore[misc]


@given(st.dictionaries(st.sampled_from([*JobSpec.model_fields, "other"]), st.none() | st.integers() | st.text()))
def test_whatever_is_wrong_stays_named_when_a_second_thing_goes_wrong(fields: dict[str, Any]) -> None:
    legal_rest = LEGAL | fields
    alone = set(pointers(legal_rest | {"other": 1}))
    assert "/other" in alone
    assert alone <= set(pointers(legal_rest | {"other": 1, "cadence": 3})) | {"/cadence"}
