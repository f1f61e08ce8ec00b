"""Whether the groups that keep tests apart are kept by whatever distributes them."""

import os

import pytest

from tests.conftest import starts_ray


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests, there are no groups")
def test_all_tests_that_start_ray_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist keeps a group together by the end of its tests' ids; another pytest may give it no say in them."""
    ids = [item.nodeid for item in request.session.items if starts_ray(item)]
    assert [nodeid for nodeid in ids if not nodeid.endswith("@ray")] == []
