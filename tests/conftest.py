"""What tests of several parts share: one real Ray head for the whole session."""

from collections.abc import Iterator

import pytest

from service.cluster.head import LocalRayHead


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRayHead]:
    """A local Ray head with 4 logical CPUs, started by the first test that asks and ended after the last."""
    head = LocalRayHead(tmp_path_factory.mktemp("ray-head"), num_cpus=4)
    try:
        head.ensure()
        yield head
    finally:
        head.stop()
