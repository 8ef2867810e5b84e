"""Names of a system's processes are its own: two systems of one cluster and Redis would end each other's processes."""

from collections.abc import Callable, Collection
from contextlib import closing

import redis

from common.errors import ConfigError
from common.net.redis import LEASE_MS, Registry
from common.net.redis_address import shown
from services.launcher.system import NameTaken, wait_until

_OTHER_RUNS_S = LEASE_MS / 1000 + 1.0
"""A record of this age is renewed by a living process: that of a killed one ends with its lease."""


def refuse_taken_names(
    url: str,
    cluster: str,
    names: Collection[str],
    *,
    each_round: Callable[[], None],
    say: Callable[[str], None],
    other_runs_s: float = _OTHER_RUNS_S,
) -> None:
    """Wait until nobody in the membership has one of these names; NameTaken if somebody still does after `other_runs_s`.

    What was killed just now is listed until its lease ends, so a system that was is started again after some seconds.
    `each_round` may raise to end the waiting. Raises ConfigError if Redis does not answer.
    """
    if not (taken := _taken(url, cluster, names)):
        return
    say(f"{', '.join(taken)} {'is' if len(taken) == 1 else 'are'} listed in Redis: waiting whether somebody is there")

    def are_free() -> bool:
        nonlocal taken
        taken = _taken(url, cluster, names)
        return not taken

    if not wait_until(are_free, timeout_s=other_runs_s, each_round=each_round):
        where = ", ".join(f"{name} ({at})" for name, at in taken.items())
        raise NameTaken(f"--cluster={cluster}: another system of this name uses --redis={shown(url)}: {where}")


def _taken(url: str, cluster: str, names: Collection[str]) -> dict[str, str]:
    """Name -> where its process is."""
    try:
        with closing(Registry(url, cluster)) as registry:
            return {one.id: f"pid {one.pid} at {one.endpoint}" for one in registry.members() if one.id in names}
    except redis.RedisError as error:
        raise ConfigError(f"--redis={shown(url)}: does not answer: {error}") from error
