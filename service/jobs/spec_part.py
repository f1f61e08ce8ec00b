"""The base of every piece of a spec."""

from pydantic import BaseModel, ConfigDict


class SpecPart(BaseModel):
    """A piece of a spec: unknown fields are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
