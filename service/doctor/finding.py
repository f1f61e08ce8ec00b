"""What a check of the doctor tells."""

from pydantic import BaseModel, ConfigDict


class Finding(BaseModel):
    """One check: what was found, and what to do where it is not ``ok``."""

    model_config = ConfigDict(frozen=True)

    check: str
    ok: bool
    found: str
    remedy: str = ""


def judge(check: str, found: str, *remedies: str) -> Finding:
    """A finding that is ok where nothing remedies it; empty remedies are none."""
    needed = [remedy for remedy in remedies if remedy]
    return Finding(check=check, ok=not needed, found=found, remedy="; ".join(needed))
