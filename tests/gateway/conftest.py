"""One Redis and one model for all gateway tests; a cluster for each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.cluster import Cluster, cluster
from tests.gateway.model import write_model
from tests.support.redis import redis_server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A private server."""
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model whose tokens are bytes."""
    return write_model(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def shared(redis_url: str, model: Path) -> Iterator[Cluster]:
    """A ready cluster with the usual settings, started once."""
    with cluster(redis_url, model) as one:
        yield one


@pytest.fixture
def up(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster: workers without a script before the test, nothing in flight after it."""
    shared.forget_script()
    yield shared
    shared.check_idle()
