"""The service's part that remembers and decides, killed between every two of its writes."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.aftermath import crashes, what_went_wrong
from tests.faults.crashing import THE_END

EVERY = 8
"""Here the process dies before each eighth of its instructions; ``make soak`` leaves none out."""


@pytest.mark.timeout(300)
def test_a_service_killed_between_any_two_writes_forgets_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    wrong: dict[str, list[str]] = {}
    killed: Counter[str] = Counter()
    for folder, killed_before in crashes(tmp_path, EVERY):
        killed[killed_before] += 1
        if problems := what_went_wrong(folder):
            wrong[f"{folder.name}: killed before {killed_before}"] = problems
    assert not wrong
    assert killed[THE_END] == 1
    assert killed.total() > 20
