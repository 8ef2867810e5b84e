"""What `penstock doctor` asks a Redis: whether it answers, how fast, and whether it may forget who is there."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any  # Any: what INFO says

import redis

from common.errors import ConfigError
from common.net.redis import Registry
from common.net.redis_address import connect_redis, shown
from services.launcher.findings import Finding, Level

_SLOW_MS = 20.0
_PINGS = 5
_SERVING = frozenset({"prefill", "decode", "mixed", "kvstore"})
_REDIS_ADVICE = (
    "where it is away start it again, `kill -CONT` it if its process is stopped, or mend the network to it; where it says what "
    "it lacks (memory, rights), give it that; what serves goes on meanwhile (`redis_lost`, `redis_back` in the logs)"
)
_WITHOUT = {
    "membership": "nobody can join, also after a restart",
    "prompt_tree": "prompts go by an old picture of the caches",
}


@dataclass(frozen=True, slots=True)
class RedisFound:
    """What it said."""

    findings: list[Finding]
    skew_ms: float | None = None
    """Its wall clock less ours."""
    members: tuple[str, ...] = ()
    """Workers and stores of the cluster that are listed there."""


def look_at_redis(url: str, cluster: str) -> RedisFound:
    """Changes nothing there. Does not raise: a Redis that does not answer is a finding."""
    try:
        client, registry = connect_redis(url), Registry(url, cluster)
    except ConfigError as error:
        return RedisFound([Finding(Level.FAIL, "redis", str(error), "correct --redis")])
    try:
        latency_ms = min(_ping_ms(client) for _ in range(_PINGS))
        seconds, micros = client.time()
        skew_ms = seconds * 1e3 + micros / 1e3 - time.time() * 1e3
        info: Mapping[str, Any] = client.info()
        members = tuple(one.id for one in registry.members() if one.role in _SERVING)
    except redis.RedisError as error:
        return RedisFound(
            [Finding(Level.FAIL, "redis", f"{shown(url)} does not answer: {error}", "start it, or correct --redis")]
        )
    finally:
        client.close()
        registry.close()
    return RedisFound(judge(url, info, latency_ms), skew_ms, members)


def _ping_ms(client: "redis.Redis") -> float:
    began_s = time.monotonic()
    client.ping()
    return (time.monotonic() - began_s) * 1e3


def judge(url: str, info: Mapping[str, Any], latency_ms: float) -> list[Finding]:
    """Findings from what INFO says. Whether it persists does not matter: every record is written again twice a second."""
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    clients, most = int(info.get("connected_clients", 0)), int(info.get("maxclients", 10_000))
    text = f"{shown(url)} answers in {latency_ms:.1f} ms; version {info.get('redis_version', '?')}, {clients} clients"
    found = [Finding(Level.OK, "redis", text)]
    if latency_ms > _SLOW_MS:
        found = [
            Finding(Level.WARN, "redis", text, "it is slow or far: keep it near the workers, and off busy machines")
        ]
    if limit and policy != "noeviction":
        text = f"it may forget members when it is full: maxmemory {limit}, policy {policy}"
        found.append(
            Finding(Level.WARN, "redis", text, "CONFIG SET maxmemory-policy noeviction, or a Redis of its own")
        )
    if limit and int(info.get("used_memory", 0)) > 0.9 * limit:
        text = f"it is nearly full: {info.get('used_memory')} of {limit} bytes"
        found.append(Finding(Level.WARN, "redis", text, "raise maxmemory: writes will be refused"))
    if clients > 0.9 * most:
        found.append(Finding(Level.WARN, "redis", f"{clients} of {most} clients", "raise maxclients"))
    return found


def check_told(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether Redis answers the gateway, by what its status says: it may lie where the doctor cannot reach it."""
    gateway = status["gateway"]
    tree, told = gateway.get("prompt_tree", {}), gateway.get("redis")
    if told is None:  # a gateway of another version
        if tree.get("tree_connected") == 0:
            yield Finding(Level.WARN, "redis", f"{gateway['id']} reads no cache events from Redis", _REDIS_ADVICE)
        return
    members_s, tree_s = told["membership_lost_s"], told["prompt_tree_lost_s"]
    if members_s is None and tree_s is None:
        yield Finding(Level.OK, "redis", f"{told['address']} answers {gateway['id']}")
        if tree.get("tree_synced") == 0:
            text = f"the prompt tree of {gateway['id']} is not complete: it routes by what it knows"
            yield Finding(Level.WARN, "redis", text, "wait some seconds; if it stays so, look at Redis and at the log")
        return
    for part, lost_s in (("membership", members_s), ("prompt_tree", tree_s)):
        if lost_s is not None:
            why = told.get(f"{part}_error") or "no answer"
            text = f"{told['address']} has not answered {gateway['id']} for {lost_s:.0f} s ({why}): {_WITHOUT[part]}"
            yield Finding(Level.FAIL, "redis", text, _REDIS_ADVICE)
