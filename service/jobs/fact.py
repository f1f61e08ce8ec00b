"""The base of every fact that a run tells."""

from pydantic import BaseModel, ConfigDict

from service.jobs.numbers import say_non_finite


class Telemetry(BaseModel):
    """Base of all facts. Non-finite numbers travel as the strings "NaN", "Infinity", "-Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", json_schema_extra=say_non_finite)
