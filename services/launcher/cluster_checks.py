"""What `penstock doctor` finds in the status document of a running system. Pure: documents in, findings out."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any  # Any: JSON
from urllib.parse import urlsplit

from services.launcher.findings import Finding, Level
from services.launcher.readiness import peer_name

Status = Mapping[str, Any]
Worker = Mapping[str, Any]

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost", None})
_STALLED_MS = 15_000.0
_MOST_SKEW_MS = 2_000.0
"""Between two wall clocks. What one says reaches the other up to a ping, half a second, late."""
_SHARED = frozenset({"shm", "cuda_ipc"})


def check_workers(status: Status) -> Iterator[Finding]:
    """Each is ready, moves, and holds nothing for too long."""
    for worker in status["workers"]:
        name, gauges = worker["id"], worker.get("gauges", {})
        stalled_ms = _number(gauges, "stalled_ms")
        if worker["state"] != "ready":
            text = f"{name} is {worker['state']}" + (f": {worker['reason']}" if worker["reason"] else "")
            yield Finding(Level.WARN, "worker", text, _advice_for(name, worker["state"]))
        elif worker.get("degraded"):
            advice = "others are preferred meanwhile; read `stuck` in its log, and restart it if it lasts"
            yield Finding(Level.WARN, "worker", f"{name} is degraded: {worker['degraded']}", advice)
        elif stalled_ms > _STALLED_MS:
            advice = f"kill -USR1 {worker['pid']} writes its state and its threads' stacks to its log"
            yield Finding(
                Level.WARN, "worker", f"{name} has work and nothing moved for {stalled_ms / 1000:.0f} s", advice
            )
        elif worker.get("breaker", "closed") != "closed":
            advice = "it failed requests of late; see its log"
            yield Finding(
                Level.WARN, "worker", f"{name}: this gateway passes it over (breaker {worker['breaker']})", advice
            )
        else:
            yield Finding(Level.OK, "worker", f"{name} is ready")


def _number(told: Mapping[str, Any], name: str) -> float:
    """One of a worker's figures; 0 if it does not tell it: what is not a number in a report is null in JSON."""
    found = told.get(name)
    return float(found) if isinstance(found, int | float) else 0.0


def _advice_for(name: str, state: str) -> str:
    return {
        "leaving": "it dropped out of Redis: is it alive, and does it reach the same --redis and --cluster?",
        "connecting": "its ZeroMQ address does not answer: is it alive, does a firewall stand between, is --advertise-host right, "
        "has it the gateway's --cluster-key (see `connection_refused` in both logs)?",
        "draining": f"POST /admin/workers/{name}/resume if that was not meant",
        "misfit": "start it with the model of this gateway, or in another --cluster",
        "refused": "make the fields named here equal on both sides",
    }.get(state, "see its log")


def check_links(status: Status) -> Iterator[Finding]:
    """How KV travels, pair by pair; pairs that need a way and have none."""
    workers = {worker["id"]: worker for worker in status["workers"]}
    kinds = {
        (worker["id"], peer_name(link["peer"])): link for worker in workers.values() for link in worker["transports"]
    }
    for (here, there), link in sorted(kinds.items()):
        yield _link(workers[here], workers.get(there), link, status["gateway"].get("unix_ms"))
        back = kinds.get((there, here))
        if back is not None and here < there and back["kind"] != link["kind"]:
            text = f"{here} -> {there} is {link['kind']}, but back it is {back['kind']}"
            yield Finding(Level.WARN, "transport", text, "give both the same --transport, --run-dir and user")
    for prefill, decode in product(_of_role(status, "prefill"), _of_role(status, "decode")):
        if prefill["model"] == decode["model"] and (prefill["id"], decode["id"]) not in kinds:
            text = f"{prefill['id']} -> {decode['id']}: no way to move KV"
            advice = (
                "see `channel_failed` in the log of the first; --transport=auto takes tcp where memory cannot be shared"
            )
            yield Finding(Level.WARN, "transport", text, advice)


def _of_role(status: Status, role: str) -> list[Worker]:
    return [worker for worker in status["workers"] if worker["role"] == role and worker["state"] == "ready"]


def _link(here: Worker, there: Worker | None, link: Mapping[str, Any], now_unix_ms: float | None) -> Finding:
    rate = f"{_number(link, 'gib_per_s'):.1f} GiB/s when they connected{_age(here, there, now_unix_ms)}"
    text = f"{here['id']} -> {peer_name(link['peer'])}: {link['kind']}, {rate}"
    one_host = there is not None and here.get("host") and here.get("host") == there.get("host")
    if link["kind"] not in _SHARED and one_host:
        why = f" ({link['reason']})" if link["reason"] else ""
        advice = (
            f"both are on one host and could share memory{why}: same user, a --run-dir that both see, "
            "in containers one volume for it and --ipc=host; not --transport=tcp"
        )
        return Finding(Level.WARN, "transport", text, advice)
    if link["reason"]:
        return Finding(Level.WARN, "transport", text, f"not the fastest: {link['reason']}")
    return Finding(Level.OK, "transport", text)


def _age(here: Worker, there: Worker | None, now_unix_ms: float | None) -> str:
    """A pair is measured when it connects, also again after it lost each other, and not in between: at most as long ago as the later of the two has been there."""
    joined = [_number(worker, "joined_unix_ms") for worker in (here, there) if worker is not None]
    if now_unix_ms is None or len(joined) < 2 or not all(joined):
        return ""
    age_s = max(0.0, now_unix_ms - max(joined)) / 1000
    return f", at most {age_s:.0f} s ago" if age_s < 120 else f", at most {age_s / 60:.0f} min ago"


def check_versions(status: Status) -> Iterator[Finding]:
    """All processes run the same software."""
    processes = [status["gateway"], *status["workers"]]
    told = {one["id"]: one["versions"] for one in processes if one.get("versions")}
    for silent in [one["id"] for one in processes if one["id"] not in told]:
        yield Finding(
            Level.WARN, "versions", f"{silent} does not say what it runs", "it is older than this doctor: update it"
        )
    for package in dict.fromkeys(name for versions in told.values() for name in versions):
        users: dict[str, list[str]] = {}
        for name, versions in told.items():
            if versions.get(package, "not installed") != "not installed":
                users.setdefault(versions[package], []).append(name)
        rows = [f"{number} on {', '.join(names)}" for number, names in sorted(users.items())]
        text = f"{package} {'; '.join(rows)}"
        if len(users) > 1:
            yield Finding(Level.WARN, "versions", text, "install the same everywhere; KV of unlike torch may differ")
        elif users:
            yield Finding(Level.OK, "versions", f"{package} {next(iter(users))} everywhere")


def check_clocks(status: Status, others: Mapping[str, float]) -> Iterator[Finding]:
    """Wall clocks agree. `others`: name -> its clock less the gateway's, ms, such as Redis'. Only logs and the age of
    members depend on it."""
    now_ms = status["gateway"].get("unix_ms")
    skews = dict(others)
    for worker in status["workers"]:
        there_ms = _number(worker.get("gauges", {}), "unix_ms")
        if now_ms is not None and there_ms:
            skews[worker["id"]] = there_ms + _number(worker, "alive_ms") - now_ms
    wrong = {name: skew for name, skew in skews.items() if abs(skew) > _MOST_SKEW_MS}
    for name, skew in wrong.items():
        text = f"{name} is {abs(skew) / 1000:.1f} s {'ahead of' if skew > 0 else 'behind'} the gateway"
        yield Finding(Level.WARN, "clock", text, "run an NTP client there: log lines cannot be put in order")
    if skews and not wrong:
        yield Finding(
            Level.OK, "clock", f"{len(skews)} clocks are within {_MOST_SKEW_MS / 1000:.0f} s of the gateway's"
        )


def check_openness(status: Status) -> Iterator[Finding]:
    """ZeroMQ addresses that other hosts reach are encrypted."""
    for worker in status["workers"]:
        policies = worker.get("policies", {})
        try:
            reached = {urlsplit(at).hostname for at in (worker["endpoint"], policies.get("bind", ""))}
        except ValueError:
            text = f"{worker['id']} announces {worker['endpoint']!r}, which is no address"
            yield Finding(Level.WARN, "network", text, "who writes into this Redis? Restart that process")
            continue
        is_open, key = not reached <= _LOOPBACK, policies.get("cluster-key", "untold")
        if is_open and key != "set":
            how = "without a key" if key == "off" else "and does not tell whether it has a key"
            text = f"{worker['id']} listens at {worker['endpoint']} for other hosts, {how}"
            advice = "give all processes the same --cluster-key, or bind to 127.0.0.1"
            yield Finding(Level.WARN, "network", text, advice)


def check_keys(status: Status) -> Iterator[Finding]:
    """All have a cluster key, or nobody: who has one does not hear who has none."""
    by_state: dict[str, list[str]] = {}
    for one in (status["gateway"], *status["workers"]):
        if told := one.get("policies", {}).get("cluster-key"):
            by_state.setdefault(told, []).append(one["id"])
    if len(by_state) > 1:
        text = "; ".join(f"{told} on {', '.join(names)}" for told, names in sorted(by_state.items()))
        yield Finding(Level.WARN, "network", f"cluster key: {text}", "give all processes the same --cluster-key")


def check_gone(status: Status, listed: Sequence[str]) -> Iterator[Finding]:
    """Who is listed in Redis answers the gateway. `listed`: ids of workers and stores there."""
    known = {worker["id"] for worker in status["workers"]}
    for name in sorted(set(listed) - known):
        text = f"{name} is in the membership and the gateway does not know it: dead, or out of reach"
        yield Finding(
            Level.WARN, "members", text, "its lease ends within 3 s if it is dead; else check its address and firewall"
        )
