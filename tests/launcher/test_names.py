"""A system does not begin where another one has its names, and does where that one has just ended."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from common.errors import ConfigError
from common.ids import Incarnation, WorkerId
from common.messages.liveness import Member
from common.net.redis import Registry
from services.launcher.names import refuse_taken_names
from services.launcher.system import NameTaken
from tests.support.redis import redis_server

STORE = Member(
    id=WorkerId("kvstore-0"), role="kvstore", incarnation=Incarnation(1), endpoint="tcp://h:1", host="h", pid=7
)
NAMES = {"kvstore-0", "decode-0"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as address:
        yield address


@pytest.fixture
def registry(url: str, request: pytest.FixtureRequest) -> Iterator[Registry]:
    with closing(Registry(url, request.node.name)) as made:
        yield made


def refuse(url: str, request: pytest.FixtureRequest, names: set[str] = NAMES) -> list[str]:
    """What was said, if all names are free at once."""
    said: list[str] = []
    refuse_taken_names(url, request.node.name, names, each_round=lambda: None, say=said.append, other_runs_s=0.0)
    return said


def test_who_is_there_is_named_with_what_to_do(url: str, registry: Registry, request: pytest.FixtureRequest) -> None:
    registry.announce(STORE)
    with pytest.raises(NameTaken, match=r"kvstore-0 \(pid 7 at tcp://h:1\).* --cluster NAME"):
        refuse(url, request)


def test_other_names_and_clusters_are_nobodys_business(
    url: str, registry: Registry, request: pytest.FixtureRequest
) -> None:
    registry.announce(STORE)
    assert refuse(url, request, {"decode-0"}) == []
    refuse_taken_names(url, "another", NAMES, each_round=lambda: None, say=print, other_runs_s=0.0)


def test_a_record_that_ends_is_waited_for(url: str, registry: Registry, request: pytest.FixtureRequest) -> None:
    registry.announce(STORE)
    said: list[str] = []
    refuse_taken_names(
        url, request.node.name, NAMES, each_round=lambda: registry.withdraw(STORE), say=said.append, other_runs_s=20.0
    )
    assert len(said) == 1 and "kvstore-0 is listed in Redis" in said[0]


def test_without_redis_it_is_said_so() -> None:
    with pytest.raises(ConfigError, match=r"--redis=redis://127.0.0.1:1/0: does not answer"):
        refuse_taken_names("redis://127.0.0.1:1/0", "c", NAMES, each_round=lambda: None, say=print)
