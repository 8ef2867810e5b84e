"""What a system that is starting still lacks, read from the gateways' status documents. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # Any: JSON


@dataclass(frozen=True, slots=True)
class Expected:
    """A worker or KV store that was started, in its present life."""

    name: str
    role: str
    pid: int


def missing(expected: Sequence[Expected], status: Mapping[str, Any]) -> dict[str, str]:
    """Name -> why it does not count yet, for everybody whom this gateway cannot use."""
    seen = {worker["id"]: worker for worker in status.get("workers", ())}
    lacking: dict[str, str] = {}
    for one in expected:
        worker = seen.get(one.name)
        if worker is None or worker["pid"] != one.pid:
            lacking[one.name] = "has not joined the membership"
        elif worker["state"] != "ready":
            lacking[one.name] = f"is {worker['state']}: {worker['reason']}"
        elif not worker["reported"]:
            lacking[one.name] = "has not reported its state"
        elif one.role == "prefill" and (without := _peers_without_link(worker, expected)):
            lacking[one.name] = f"has no KV transport to {', '.join(without)} yet"
    return lacking


def _peers_without_link(worker: Mapping[str, Any], expected: Sequence[Expected]) -> list[str]:
    linked = {peer_name(link["peer"]) for link in worker["transports"]}
    return [one.name for one in expected if one.role == "decode" and one.name not in linked]


def peer_name(peer: str) -> str:
    """The worker's name in a peer id, for people to read."""
    return peer.partition("@")[0]
