"""A receiver, and a folder with the one secret that messages to it are signed with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.webhooks.receiving import Receiver, receiving

SECRET = b"a-secret-of-these-tests"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "good").write_bytes(SECRET + b"\n")
    (folder / "good").chmod(0o600)
    return folder
