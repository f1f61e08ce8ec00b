"""The service's part that remembers and decides, killed between every two of its writes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.aftermath import crashes, what_went_wrong
from tests.faults.crashing import THE_END
from tests.faults.databases import Databases, Files, OnServer
from tests.postgresql import PostgresServer

EVERY = 8
"""Here the process dies before each eighth of its instructions; ``make soak`` leaves none out."""


@contextmanager
def where_databases_are(kind: str) -> Iterator[tuple[Databases, list[str]]]:
    """The databases, and what the dying processes must be told to find them."""
    if kind == "sqlite":
        yield Files(), []
        return
    server = PostgresServer()
    try:
        server.start()
        url = server.url().get_secret_value()
        yield OnServer(url), [url]
    finally:
        server.remove()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_service_killed_between_any_two_writes_forgets_nothing_and_does_nothing_twice(
    kind: str, tmp_path: Path
) -> None:
    wrong: dict[str, list[str]] = {}
    killed: Counter[str] = Counter()
    with where_databases_are(kind) as (databases, told):
        for folder, killed_before in crashes(tmp_path, EVERY, *told):
            killed[killed_before] += 1
            if problems := what_went_wrong(folder, databases):
                wrong[f"{folder.name}: killed before {killed_before}"] = problems
    assert not wrong
    assert killed[THE_END] == 1
    assert killed.total() > 20
